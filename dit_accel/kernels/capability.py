"""Which attention backend can run a call: one predicate per backend that returns a reason or None.

Nothing here imports Triton; the predicates are the same for the automatic choice and for a named backend.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from functools import cache

import torch

from .block_mask import BlockMask

TRITON_BLOCKS_Q = (16, 32, 64, 128)
TRITON_BLOCKS_K = (16, 32, 64, 128)
TRITON_MAX_HEAD_DIM = 256
FA4_BLOCKS = (64, 128)


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


def interpreted() -> bool:
    """Whether Triton kernels run in its CPU interpreter (``TRITON_INTERPRET=1``), as the tests do."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not_reference(q: torch.Tensor, mask: BlockMask) -> str | None:
    """None: the reference backend runs everything that passes validation."""
    return None


def why_not_torch(q: torch.Tensor, mask: BlockMask) -> str | None:
    """None: the gather backend runs everything that passes validation."""
    return None


def why_not_triton(q: torch.Tensor, mask: BlockMask) -> str | None:
    """Why the Triton backend cannot run a call with this query tensor and mask, or None if it can."""
    if not _TRITON_INSTALLED:
        return "triton is not installed"
    if q.device.type == "cuda":
        major, minor = compute_capability(q.device.index or 0)
        if major < 8:
            return f"the triton kernels need compute capability 8.0 or newer, got {major}.{minor}"
    elif not interpreted():
        return f"the triton kernels need a CUDA device, got {q.device.type}"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the triton kernels take float16, bfloat16 or float32, got {q.dtype}"
    if q.shape[-1] > TRITON_MAX_HEAD_DIM:
        return f"the triton kernels take head dims up to {TRITON_MAX_HEAD_DIM}, got {q.shape[-1]}"
    if mask.block_q not in TRITON_BLOCKS_Q or mask.block_k not in TRITON_BLOCKS_K:
        return (
            f"the triton kernels take block_q and block_k in {TRITON_BLOCKS_Q}, got {mask.block_q} and {mask.block_k}"
        )
    return None


def why_not_fa4(
    q: torch.Tensor, mask: BlockMask, rows: torch.Tensor | None = None, key_mask: torch.Tensor | None = None
) -> str | None:
    """Why flash-attn-4 cannot run a call, or None if it can; its gradients come from the Triton backward."""
    if not _FA4_INSTALLED:
        return "flash-attn-4 is not installed (pip install dit-accel[fa4])"
    if q.device.type != "cuda":
        return f"flash-attn-4 needs a CUDA device, got {q.device.type}"
    major, minor = compute_capability(q.device.index or 0)
    if (major, minor) != (9, 0):
        return f"flash-attn-4's block lists are translated for compute capability 9.0, got {major}.{minor}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn-4 takes float16 or bfloat16, got {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"flash-attn-4 takes head dims that are multiples of 8, up to 128 with block lists, got {q.shape[-1]}"
    if mask.block_q not in FA4_BLOCKS or mask.block_k not in FA4_BLOCKS:
        return f"flash-attn-4 takes blocks of 64 and 128 tokens here, got {mask.block_q}x{mask.block_k}"
    if rows is not None:
        return "flash-attn-4 reads rows in order; a permutation would need reordered copies of q, k, v and the output"
    if key_mask is not None:
        return "flash-attn-4 has no key mask with block lists"
    if mask.token_bits is not None and mask.token_bits.shape[0] > 0:
        return "flash-attn-4 has no token bits"
    if q.requires_grad:
        return why_not_triton(q, mask)
    return None
