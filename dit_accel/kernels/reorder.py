"""Keys and values in permuted order, both written in one pass at memory speed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .triton_forward import SIZES, mask_strides, padded_head_dim, unit_stride


@triton.jit(do_not_specialize=SIZES)
def reorder_pair_kernel(
    a_ptr,
    b_ptr,
    a_out_ptr,
    b_out_ptr,
    rows_ptr,
    stride_ab,
    stride_as,
    stride_ah,
    stride_bb,
    stride_bs,
    stride_bh,
    stride_ob,
    stride_os,
    stride_oh,
    rows_batch_stride,
    rows_head_stride,
    heads,
    length,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    live = (slot < length)[:, None] & (offs_d < HEAD_DIM)[None, :]
    rows_ptr += batch * rows_batch_stride + head * rows_head_stride
    row = tl.load(rows_ptr + slot, mask=slot < length, other=0).to(tl.int64)[:, None]
    a = tl.load(a_ptr + batch * stride_ab + head * stride_ah + row * stride_as + offs_d[None, :], mask=live)
    b = tl.load(b_ptr + batch * stride_bb + head * stride_bh + row * stride_bs + offs_d[None, :], mask=live)
    at = batch * stride_ob + head * stride_oh + slot.to(tl.int64)[:, None] * stride_os + offs_d[None, :]
    tl.store(a_out_ptr + at, a, mask=live)
    tl.store(b_out_ptr + at, b, mask=live)


def reorder_pair(a: torch.Tensor, b: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row ``rows[b, h, n]`` at slot ``n``, of two ``[B, S, H, D]`` tensors; rows int32 ``[B|1, H|1, S]``."""
    batch, length, heads, dim = a.shape
    a, b = unit_stride(a), unit_stride(b)
    outs = [torch.empty((batch, length, heads, dim), dtype=a.dtype, device=a.device) for _ in range(2)]
    block = 64
    reorder_pair_kernel[(triton.cdiv(length, block), batch * heads)](
        a,
        b,
        *outs,
        rows,
        *a.stride()[:3],
        *b.stride()[:3],
        *outs[0].stride()[:3],
        *mask_strides(rows, length),
        heads,
        length,
        BLOCK=block,
        BLOCK_D=padded_head_dim(dim),
        HEAD_DIM=dim,
        num_warps=4,
    )
    return outs[0], outs[1]
