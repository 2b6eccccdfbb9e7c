"""Launch of the Hopper kernel: which calls it can run, and the call."""

from __future__ import annotations

from functools import cache

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .block_mask import BlockMask
from .hopper_kernel import hopper_fwd_kernel
from .reorder import reorder_pair
from .triton_forward import LOG2_E, mask_strides

_ROWS = 64  # query rows of a consumer warpgroup


def why_not_hopper(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask, rows: torch.Tensor | None
) -> str | None:
    """Why this kernel cannot run a call that the Triton backend can, or None if it can."""
    if not q.is_cuda or _capability(q.device.index or 0) != (9, 0):
        return "it needs a GPU of compute capability 9.0"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 or bfloat16, got {q.dtype}"
    if q.shape[-1] not in (64, 128):
        return f"it takes head dims 64 and 128, got {q.shape[-1]}"
    if mask.block_q != 128 or mask.block_k not in (64, 128):
        return f"it takes blocks of 128x64 and 128x128, got {mask.block_q}x{mask.block_k}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1 or (rows is None and x.stride(2) != x.shape[3]):
            return f"the heads of {name} do not lie side by side"
        if x.data_ptr() % 16 or (x.stride(1) * 2) % 16 or (x.stride(0) * 2) % 16:
            return f"{name} is not aligned to 16 bytes"
    return None


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@cache
def multiprocessors(index: int) -> int:
    """Multiprocessors of a GPU: the programs of a persistent launch."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def _descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """Tiles ``[rows, D]`` of one batch entry ``[S, H, D]``; rows past S read as zero."""
    length, heads, dim = x.shape
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(x, [length, heads * dim], [x.stride(0), 1], [rows, dim], layout)


def hopper_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    scale: float,
    stages: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``out`` and ``lse`` of a call for which :func:`why_not_hopper` found nothing."""
    batch, q_len, heads, dim = q.shape
    kv_len = k.shape[1]
    out = torch.empty((batch, q_len, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=q.device)
    nq, _ = mask.num_blocks
    if rows is not None:
        rows = rows.to(torch.int32).contiguous()
        k, v = reorder_pair(k, v, rows)
    counts, fulls, index = (x.contiguous() for x in (mask.kv_num_blocks, mask.kv_num_full, mask.kv_indices))
    bit_rows = index if mask.kv_bits is None else mask.kv_bits.contiguous()
    bits = index if mask.token_bits is None else mask.token_bits.contiguous()
    hidden = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    programs = min(nq * heads, multiprocessors(q.device.index or 0))
    if stages is None:
        # Shared memory: 128 query rows, then keys and values of every stage.
        stages = min(4, (220 << 10) // 2 // (2 * mask.block_k * dim) - (1 if mask.block_k == 64 else 0))
    rows_strides = (0, 0) if rows is None else mask_strides(rows, q_len)
    for b in range(batch):
        mb = b if counts.shape[0] > 1 else 0
        rows_b = index if rows is None else rows[b if rows.shape[0] > 1 else 0]
        hopper_fwd_kernel[(programs,)](
            _descriptor(q[b], _ROWS),
            _descriptor(k[b], mask.block_k),
            _descriptor(v[b], mask.block_k),
            q[b],
            out[b],
            lse[b],
            counts[mb],
            fulls[mb],
            index[mb],
            bit_rows[mb],
            bits,
            rows_b,
            index if hidden is None else hidden[b],
            *q.stride()[1:3],
            *out.stride()[1:3],
            rows_strides[1],
            nq,
            heads,
            nq * heads,
            mask_strides(index, nq)[1],
            index.shape[-1],
            q_len,
            kv_len,
            scale * LOG2_E,
            BLOCK_K=mask.block_k,
            HEAD_DIM=dim,
            STAGES=stages,
            PERMUTED=rows is not None,
            HAS_BITS=mask.kv_bits is not None and mask.token_bits.shape[0] > 0,
            HAS_KEY_MASK=key_mask is not None,
            num_warps=4,
        )
    return out, lse
