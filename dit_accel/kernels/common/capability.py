"""What kernels and flash-attn-4 need of a device and a call: predicates that return a reason or None.

Nothing here imports Triton; the predicates are the same for the automatic choice and for a named backend.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from functools import cache
from typing import Any

import torch

from .choice import Case, Choice, choose

TRITON_BLOCKS_Q = (16, 32, 64, 128)
TRITON_BLOCKS_K = (16, 32, 64, 128)
TRITON_MAX_HEAD_DIM = 256
# Query and key blocks of flash-attn-4's lists (4.0.0b36), by compute capability: on Blackwell a program takes two tiles
# of 128 queries, so that lists are of 256, and tiles of 128 keys. It refuses lists on 8.x and 12.x.
FA4_BLOCKS = {9: ((64, 128), (64, 128)), 10: ((256,), (128, 256))}


# Looked up once, without importing it; a cached function would make torch.compile warn.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def _distribution_installed(name: str) -> bool:
    # By distribution: looking for the module flash_attn.cute would import flash-attn 2 where that is installed.
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


_FA4_INSTALLED = _distribution_installed("flash-attn-4")


@cache
def compute_capability(index: int) -> tuple[int, int]:
    """Of a GPU, as (9, 0)."""
    return torch.cuda.get_device_capability(index)


@cache
def multiprocessors(index: int) -> int:
    """Multiprocessors of a GPU: the programs of a persistent launch."""
    return torch.cuda.get_device_properties(index).multi_processor_count


@cache
def shared_memory(index: int) -> int:
    """Bytes of shared memory that a program may have on a GPU."""
    properties: Any = torch.cuda.get_device_properties(index)  # torch's own types leave these out
    return int(properties.shared_memory_per_block if is_amd() else properties.shared_memory_per_block_optin)


def sums_twice_as_fast_in_half(index: int) -> bool:
    """Whether a GPU adds up products of float16 twice as fast in float16 as in float32: GeForce and what is built of
    its chips (8.6, 8.9 and 12.x). Data-centre GPUs do not."""
    return not is_amd() and compute_capability(index) in ((8, 6), (8, 9), (12, 0), (12, 1))


def is_amd() -> bool:
    """Whether torch's GPUs are AMD's, whose numbers of compute capability mean other things."""
    return torch.version.hip is not None


def interpreted() -> bool:
    """Whether Triton kernels run in its CPU interpreter (``TRITON_INTERPRET=1``), as the tests do."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not_kernels(case: Case) -> str | None:
    """Why no Triton kernel runs on a device, or None; what every operation's kernels ask first."""
    if not _TRITON_INSTALLED:
        return "triton is not installed"
    if case.device.type == "cuda":
        major, minor = compute_capability(case.device.index or 0)
        if major < 8 and not is_amd():
            return f"the triton kernels need compute capability 8.0 or newer, got {major}.{minor}"
    elif not interpreted():
        return f"the triton kernels need a CUDA device, got {case.device.type}"
    return None


def choose_selection(case: Case, backend: str = "auto") -> Choice:
    """The backend of all that works on blocks alone: pooling and statistics, top-k and top-p, and the lists of masks.

    Raises:
        ValueError: an unknown backend, or ``"triton"`` where no Triton kernel runs.
    """
    return choose("selection", backend, case, why_not_kernels(case))


def why_not_tiles(case: Case) -> str | None:
    """Why kernels that multiply whole tiles of 16 or more rows cannot run a case, or None if they can."""
    reason = why_not_kernels(case)
    if reason is None and case.dtype not in (None, torch.float16, torch.bfloat16, torch.float32):
        return f"the triton kernels take float16, bfloat16 or float32, got {case.dtype}"
    if reason is None and case.blocks is not None and any(n < 16 or n & (n - 1) for n in case.blocks):
        return f"the triton kernels take blocks of a power of two from 16, got {_spell(case.blocks)}"
    return reason


def why_not_triton(case: Case) -> str | None:
    """Why the Triton kernels cannot run block-sparse attention, or None if they can."""
    reason = why_not_tiles(case._replace(blocks=None))
    if reason is not None:
        return reason
    if case.head_dim is not None and case.head_dim > TRITON_MAX_HEAD_DIM:
        return f"the triton kernels take head dims up to {TRITON_MAX_HEAD_DIM}, got {case.head_dim}"
    if case.blocks is not None and not (case.blocks[0] in TRITON_BLOCKS_Q and case.blocks[1] in TRITON_BLOCKS_K):
        return (
            f"the triton kernels take block_q and block_k in {TRITON_BLOCKS_Q}, got "
            f"{case.blocks[0]} and {case.blocks[1]}"
        )
    return None


def why_not_fa4(case: Case) -> str | None:
    """Why flash-attn-4 cannot run a call, or None if it can; its gradients come from the Triton backward."""
    if not _FA4_INSTALLED:
        return "flash-attn-4 is not installed (pip install 'dit-accel[fa4]')"
    if case.device.type != "cuda":
        return f"flash-attn-4 needs a CUDA device, got {case.device.type}"
    if is_amd():
        return "flash-attn-4 is for NVIDIA's GPUs"
    major, minor = compute_capability(case.device.index or 0)
    if major not in FA4_BLOCKS:
        return f"flash-attn-4 has block lists on compute capability 9.0 and 10.x, got {major}.{minor}"
    if case.dtype not in (None, torch.float16, torch.bfloat16):
        return f"flash-attn-4 takes float16 or bfloat16, got {case.dtype}"
    if case.head_dim is not None and (case.head_dim % 8 or case.head_dim > 128):
        return f"flash-attn-4 takes head dims that are multiples of 8, up to 128 with block lists, got {case.head_dim}"
    of_queries, of_keys = FA4_BLOCKS[major]
    if case.blocks is not None and not (case.blocks[0] in of_queries and case.blocks[1] in of_keys):
        return (
            f"flash-attn-4 takes blocks of {' or '.join(map(str, of_queries))} queries and "
            f"{' or '.join(map(str, of_keys))} keys here, got {_spell(case.blocks)}"
        )
    if case.permuted:
        return "flash-attn-4 reads rows in order; a permutation would need reordered copies of q, k, v and the output"
    if case.hidden:
        return "flash-attn-4 has no key mask with block lists"
    if case.token_bits:
        return "flash-attn-4 has no token bits"
    return why_not_triton(case) if case.recorded else None


def _spell(blocks: tuple[int, int]) -> str:
    return f"{blocks[0]}x{blocks[1]}"
