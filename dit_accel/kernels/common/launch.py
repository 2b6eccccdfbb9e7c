"""What launchers of kernels share: sizes that never cause a compilation, strides, padded dims, stand-ins for pointers.

Nothing here imports Triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .capability import is_amd

if TYPE_CHECKING:
    from ..mask.block_mask import BlockMask

LOG2_E = 1.4426950408889634
# Of products of float32, which TF32 would round to 11 bits; without meaning for the half formats, and known everywhere.
DOT_PRECISION = "ieee"
# Arguments that change with the sequence or the mask: no new compilation for another length.
SIZES = (
    "heads",
    "list_length",
    "q_len",
    "kv_len",
    "mask_batch_stride",
    "mask_head_stride",
    "rows_batch_stride",
    "rows_head_stride",
)


def is_captured(device: torch.device) -> bool:
    """Whether what is launched on a device now goes into a CUDA graph: nothing may be read then, or waited for, and
    what it makes is the graph's own."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def ceil_div(total: int, part: int) -> int:
    """Parts that ``total`` needs. Triton's own, which kernels know too, costs 10 us of the host."""
    return -(-total // part)


def power_of_two(least: int) -> int:
    """The first power of two from ``least`` on, at least 1."""
    return 1 << (least - 1).bit_length() if least > 1 else 1


def padded_head_dim(dim: int) -> int:
    """Columns of the tile that holds a head: a power of two, at least 16."""
    return max(16, power_of_two(dim))


def register_limit(registers: int | None) -> dict[str, int]:
    """The option of a launch that limits registers a thread; none on AMD's GPUs, whose compiler does not know it."""
    return {} if registers is None or is_amd() else {"maxnreg": registers}


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """``x`` with a last dimension of stride 1, copied only if needed."""
    return x if x.stride(-1) == 1 else x.contiguous()


def int32_rows(rows: torch.Tensor | None) -> torch.Tensor | None:
    """A permutation as contiguous int32, as kernels with :data:`SIZES` read it."""
    return None if rows is None else rows.to(torch.int32).contiguous()


def contiguous_rows(rows: torch.Tensor | None) -> torch.Tensor | None:
    """A permutation whose slots are adjacent in memory; expanded leading dimensions may stay."""
    return None if rows is None else unit_stride(rows)


def contiguous_key_mask(key_mask: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
    """A key mask ``[B|1, S]`` as contiguous ``[batch, length]``."""
    return None if key_mask is None else key_mask.expand(batch, length).contiguous()


def token_strides(*tensors: torch.Tensor) -> tuple[int, ...]:
    """Strides of batch, token and head of each ``[B, S, H, D]``, whose columns are adjacent."""
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def lead_strides(x: torch.Tensor | None) -> tuple[int, ...]:
    """Strides of the leading ``B`` and ``H``, 0 where a size is 1 (broadcast); zeros for None."""
    if x is None:
        return 0, 0
    (batch, heads), (along_batch, along_heads) = x.shape[:2], x.stride()[:2]
    return (0 if batch == 1 else along_batch), (0 if heads == 1 else along_heads)


def list_strides(x: torch.Tensor | None, rows_per_head: int) -> tuple[int, int]:
    """Steps along batch and head of a contiguous ``[B|1, H|1, ...]``, in rows of which a head has so many.

    A row is what the kernel counts: a query block's row of the lists, or a token of a permutation. Zeros for None.
    """
    if x is None:
        return 0, 0
    batch, heads = x.shape[:2]
    return (heads * rows_per_head if batch > 1 else 0), (rows_per_head if heads > 1 else 0)


def or_stand_in(x: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    """``x``, or for None any tensor: a pointer that the kernel does not follow."""
    return stand_in if x is None else x


def mask_tensors(
    mask: BlockMask, rows: torch.Tensor | None, key_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Counts, full counts, lists, rows of bits, bits, permutation and key mask, each contiguous or a stand-in."""
    index = mask.kv_indices.contiguous()
    return (
        mask.kv_num_blocks.contiguous(),
        mask.kv_num_full.contiguous(),
        index,
        index if mask.kv_bits is None else mask.kv_bits.contiguous(),
        index if mask.token_bits is None else mask.token_bits.contiguous(),
        or_stand_in(rows, index),
        index if key_mask is None else key_mask.contiguous().view(torch.uint8),
    )


def mask_constants(mask: BlockMask, rows: torch.Tensor | None, key_mask: torch.Tensor | None) -> dict[str, int | bool]:
    """Constants of a kernel that reads :func:`mask_tensors`."""
    return {
        "BLOCK_Q": mask.block_q,
        "BLOCK_K": mask.block_k,
        "PERMUTED": rows is not None,
        "HAS_BITS": mask.token_bits is not None and mask.token_bits.shape[0] > 0,
        "HAS_KEY_MASK": key_mask is not None,
    }
