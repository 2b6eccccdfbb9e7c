"""Which kernel of the Triton backend runs a call: the Hopper one where it applies, else the portable one."""

from __future__ import annotations

import os
from functools import cache

import torch

from ..common.capability import is_amd
from ..common.choice import Choice
from ..mask.block_mask import BlockMask
from .means import LeftOutMeans

ON_HOPPER = "Hopper kernel"
# The kernel compiles with these and not before; CI compiles it with the oldest and the newest.
OLDEST_TRITON = (3, 6)
# Whether half-precision calls with blocks of 64 queries run in the Hopper kernel, two blocks a program: on an H200 1.7
# to 1.9 times as fast as the portable kernel at head dim 128, and 1.07 to 1.15 times at 64 (notes/hopper_pairs.md).
PAIRS_ON_HOPPER = True
# Queries a block of half-precision calls that attend the means of what they leave out in the same launch, where both
# are wanted. With 128 a call with means takes 1.12 times one without at density 0.2 (1.21 in two launches) and 1.22 at
# 0.1 (1.40); with 64, two blocks a program, it takes 1.55 (1.19) and 1.61 (1.33), so 64 stays out: under load, 32,760
# tokens of 12 heads of 128, H200, `python benchmarks/kernels.py --sections carried --lengths 32760 --heads 12`. 128
# waits for whole runs: on a Hopper GPU put it here, run
#     pytest -m gpu tests/stages/test_residual.py tests/patches/test_graphs_gpu.py
# and measure the default anew at real length (docs/fidelity.md).
MEANS_ON_HOPPER_AT: tuple[int, ...] = ()
# The same of 8-bit calls at head dim 128: 1.5 to 1.7 times as fast in INT8, 4.7 times with FP8 values. Nobody has timed
# head dim 64. On a Hopper GPU run
#     python benchmarks/kernels.py --sections pairs8 --lengths 32760 --head-dim 64 --seconds 100 --json pairs8.json
# and add it if it is ahead of the portable kernel there.
PAIRS_IN_8_BITS_AT = (128,)


def kernel_of(choice: Choice, why_not_hopper: str | None) -> Choice:
    """A choice of Triton whose reason also names the kernel."""
    kernel = f"portable kernel, not the Hopper one: {why_not_hopper}" if why_not_hopper else ON_HOPPER
    return Choice(choice.name, f"{choice.reason}; {kernel}")


def why_not_hopper_half(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask, rows: torch.Tensor | None
) -> str | None:
    """Why the Hopper kernel cannot run a half-precision call, or None if it can."""
    reason = _why_not_gluon(q)
    if reason is not None:
        return reason
    from .hopper.forward import why_not_hopper

    if mask.block_q == 64 and not PAIRS_ON_HOPPER:
        return "its form for blocks of 64 queries is switched off"
    return why_not_hopper(q, k, v, mask, rows)


def why_not_hopper_means(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    means: LeftOutMeans,
) -> str | None:
    """Why the Hopper kernel cannot attend, in the launch of a half-precision call, the means of what it leaves out, or
    None if it can."""
    if mask.block_q not in MEANS_ON_HOPPER_AT:
        return f"its form with means is switched off for blocks of {mask.block_q} queries"
    reason = why_not_hopper_half(q, k, v, mask, rows)
    if reason is not None:
        return reason
    from .hopper.forward import why_not_means

    return why_not_means(mask, key_mask, means)


def why_not_hopper_quantized(q: torch.Tensor, mask: BlockMask, smooth_q: bool) -> str | None:
    """Why the Hopper kernel cannot run a quantised call, or None if it can; ``q`` as before quantisation."""
    reason = _why_not_gluon(q)
    if reason is not None:
        return reason
    if smooth_q:
        return "it does not add the mean query's logits back"
    if mask.block_q == 64 and q.shape[-1] not in PAIRS_IN_8_BITS_AT:
        return f"its 8-bit form for blocks of 64 queries has not been timed at head dim {q.shape[-1]}"
    from .hopper.forward import why_not_shape

    return why_not_shape(q, mask)


def _why_not_gluon(q: torch.Tensor) -> str | None:
    if not q.is_cuda or os.environ.get("TRITON_INTERPRET", "0") == "1":
        return "it needs a GPU"
    if is_amd():
        return "it is for NVIDIA's GPUs"
    return _why_not_this_triton()


@cache
def _why_not_this_triton() -> str | None:
    """Asked by every call, and the same for all of a process."""
    import triton

    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"it needs Triton {'.'.join(map(str, OLDEST_TRITON))} or newer, this is {triton.__version__}"
    try:
        from .hopper import forward  # noqa: F401
    except ImportError as error:  # Gluon is experimental: other Triton versions may lack a name
        return f"this Triton lacks a part of Gluon ({error})"
    return None
