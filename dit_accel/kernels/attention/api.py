"""Public block-sparse attention: one operation, several backends, no silent fallback."""

from __future__ import annotations

import math

import torch

from ..common import capability
from ..common.choice import BY_NAME, FASTEST, INTERPRETER, Case, Choice, Operation, case_of, check_backend, refusal
from ..common.scale import scale_of
from ..mask.block_mask import BlockMask
from . import tuning
from .means import LeftOutMeans


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    *,
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in which every query block reads only the key blocks that ``mask`` lists.

    Query rows that see no key give output 0 and log-sum-exp ``-inf``. NaN in a visible row propagates.

    Args:
        q: ``[B, Sq, H, D]``, any strides.
        k: ``[B, Skv, H, D]``, any strides, dtype and device of ``q``.
        v: as ``k``.
        mask: kept blocks, in permuted order when ``rows`` is given; its ``B`` and ``H`` may be 1.
        rows: optional int32 or int64 permutation ``[B or 1, H or 1, S]``, for ``Sq == Skv == S`` only: slot
            ``n`` of the permuted sequence reads row ``rows[b, h, n]`` of q, k and v alike. Output and
            log-sum-exp come back in the original order.
        key_mask: optional bool ``[B, Skv]`` in the original order; False hides a key. Every listed block that
            holds a hidden key must be listed as partial, since full blocks are not masked.
        scale: positive factor on the logits; ``D ** -0.5`` if None.
        return_lse: also return the natural log of each row's softmax denominator.
        backend: one of :data:`~dit_accel.kernels.BACKENDS`. A named backend that cannot run the call raises.

    Returns:
        ``out [B, Sq, H, D]`` in ``q.dtype``; with ``return_lse`` also ``lse [B, H, Sq]`` in float32 (float64
        for float64 inputs). Both are in the original row order.

    Raises:
        ValueError: shapes, dtypes, devices or the mask do not fit together, a scale that is not positive, or the named
            backend cannot run the call.
    """
    validate(q, k, v, mask, rows, key_mask)
    name = choose_attention(case_of(q, k, v, mask=mask, rows=rows, key_mask=key_mask), backend).name
    out, lse = attend_by(name, q, k, v, mask, rows=rows, key_mask=key_mask, scale=scale, return_lse=return_lse)
    if return_lse:
        assert lse is not None
        return out, lse
    return out


def attend_by(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    *,
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    means: LeftOutMeans | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`block_sparse_attention` after :func:`validate`, by a backend that :func:`choose_attention` gave for calls
    like this one. The log-sum-exp is there where it was asked for or cost nothing.

    ``means`` are attended in the same softmax, in calls for which :func:`why_not_at_once` found nothing.

    Raises:
        ValueError: a scale that is not positive.
    """
    scale = float(scale_of(q, scale))
    if not 0.0 < scale < math.inf:
        # The kernels take the largest product of a row for that of its largest logit.
        raise ValueError(f"scale must be positive and finite, got {scale}.")
    if name == "triton":
        from .op import triton_attention

        return triton_attention(q, k, v, mask, rows=rows, key_mask=key_mask, scale=scale, means=means)
    assert means is None
    if name == "fa4":
        from .flash_attn4 import fa4_attention

        return fa4_attention(q, k, v, mask, scale=scale)
    if name == "torch":
        from .gather import gather_attention

        return gather_attention(q, k, v, mask, rows=rows, key_mask=key_mask, scale=scale, return_lse=return_lse)
    from .reference import reference_attention

    return reference_attention(q, k, v, mask, rows=rows, key_mask=key_mask, scale=scale)


def why_not_at_once(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    means: LeftOutMeans,
    *,
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
) -> str | None:
    """Why a call by a backend cannot attend the means of what it leaves out in the launch of what it keeps, so that
    :func:`~dit_accel.kernels.pyramid.means.add_left_out_means` follows; None if it can."""
    if name != "triton" or means.backend != "triton":
        return "it is the Triton backend's"
    from .op import why_not_means

    return why_not_means(q, k, v, mask, rows, key_mask, means)


def choose_backend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    *,
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    backend: str = "auto",
    operation: Operation = "attention",
) -> Choice:
    """Name the backend that :func:`block_sparse_attention` uses for a call, and say why.

    ``"fa4"`` is chosen by itself only for cases that the GPU's tuning table lists as measured faster there. Of the
    Triton backend the reason names the kernel, the Hopper or the portable one.

    Args:
        operation: what an error calls it.

    Raises:
        ValueError: an unknown backend, or a named one that cannot run the call.
    """
    choice = choose_attention(case_of(q, k, v, mask=mask, rows=rows, key_mask=key_mask), backend, operation)
    if choice.name != "triton":
        return choice
    from .variants import kernel_of, why_not_hopper_half

    return kernel_of(choice, why_not_hopper_half(q, k, v, mask, rows))


def choose_attention(case: Case, backend: str, operation: Operation = "attention") -> Choice:
    """:func:`choose_backend` without a word about kernels, which every call would pay for."""
    check_backend(backend)
    if backend != "auto":
        reason = None
        if backend in ("fa4", "triton"):
            reason = capability.why_not_fa4(case) if backend == "fa4" else capability.why_not_triton(case)
        if reason is not None:
            raise refusal(operation, backend, reason)
        return Choice(backend, BY_NAME)
    passed_over = []
    if tuning.fa4_is_fastest(case):
        reason = capability.why_not_fa4(case)
        if reason is None:
            return Choice("fa4", "measured the fastest for this block size and head dim")
        passed_over.append(f"fa4: {reason}")
    reason = capability.why_not_triton(case)
    if reason is None and case.device.type != "cuda":
        reason = INTERPRETER
    choice = Choice("triton", FASTEST) if reason is None else Choice("torch", f"triton: {reason}")
    return Choice(choice.name, "; ".join([*passed_over, choice.reason]))


def validate(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
) -> None:
    """Raise a ValueError that names what does not fit in a call of the attention operations."""
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q, k and v must be [B, S, H, D], got {tuple(q.shape)} and {tuple(k.shape)}.")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}.")
    batch, q_len, heads, dim = q.shape
    kv_len = k.shape[1]
    if (batch, heads, dim) != (k.shape[0], k.shape[2], k.shape[3]):
        raise ValueError(f"q and k must agree in batch, heads and head dim, got {tuple(q.shape)} and {tuple(k.shape)}.")
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share one floating-point dtype, got {q.dtype}, {k.dtype} and {v.dtype}.")
    if (mask.q_len, mask.kv_len) != (q_len, kv_len):
        raise ValueError(f"The mask is for {mask.q_len} queries and {mask.kv_len} keys, got {q_len} and {kv_len}.")
    lead = tuple(mask.kv_num_blocks.shape[:2])
    if lead[0] not in (1, batch) or lead[1] not in (1, heads):
        raise ValueError(f"The mask's batch and heads must be 1 or {batch} and 1 or {heads}, got {lead}.")
    if mask.token_bits is not None and mask.block_k % 32:
        raise ValueError(f"token_bits need block_k to be a multiple of 32, got {mask.block_k}.")
    if rows is not None:
        if q_len != kv_len:
            raise ValueError(f"rows need as many keys as queries, got {q_len} queries and {kv_len} keys.")
        if rows.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"rows must be int32 or int64, got {rows.dtype}.")
        if rows.dim() != 3 or rows.shape[0] not in (1, batch) or rows.shape[1] not in (1, heads):
            raise ValueError(f"rows must be [1 or {batch}, 1 or {heads}, {q_len}], got {tuple(rows.shape)}.")
        if rows.shape[2] != q_len:
            raise ValueError(f"rows must permute {q_len} tokens, got {rows.shape[2]}.")
    if key_mask is not None and (key_mask.dtype != torch.bool or tuple(key_mask.shape) != (batch, kv_len)):
        raise ValueError(f"key_mask must be bool [{batch}, {kv_len}], got {key_mask.dtype} {tuple(key_mask.shape)}.")
    device = q.device
    named = (("k", k), ("v", v), ("mask", mask.kv_indices), ("rows", rows), ("key_mask", key_mask))
    for name, tensor in named:
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {tensor.device}.")
