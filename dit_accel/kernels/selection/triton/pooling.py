"""Triton kernels of block means: q and k are each read once, in place, through their permutation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...common.compiled import KeptKernel
from ...common.launch import ceil_div, contiguous_key_mask, contiguous_rows, lead_strides, power_of_two

POOL_ELEMENTS, POOL_WARPS = 2048, 1
"""Elements and warps of one pooling step."""


@triton.jit
def pool_one(
    x_ptr,
    rows_ptr,
    mask_ptr,
    out_ptr,
    pid,
    seq,
    heads,
    blocks,
    scale,
    stride_xb,
    stride_xs,
    stride_xh,
    stride_xd,
    stride_rb,
    stride_rh,
    stride_mb,
    HAS_ROWS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """``scale`` times the mean of one block."""
    # Heads run fastest, so that programs in flight together read neighbouring memory of (B, S, H, D).
    h = pid % heads
    i = (pid // heads) % blocks
    b = pid // (heads * blocks)
    o_d = tl.arange(0, DIM_PAD)
    x_ptr += b.to(tl.int64) * stride_xb + h.to(tl.int64) * stride_xh
    total = tl.zeros([DIM_PAD], tl.float32)
    count = 0.0
    for start in tl.static_range(0, BLOCK, CHUNK):
        o_in = start + tl.arange(0, CHUNK)
        slot = i * BLOCK + o_in
        valid = (slot < seq) & (o_in < BLOCK)
        row = slot
        if HAS_ROWS:
            row = tl.load(rows_ptr + b * stride_rb + h * stride_rh + slot, mask=valid, other=0)
        if HAS_MASK:
            valid = valid & (tl.load(mask_ptr + b * stride_mb + row, mask=valid, other=0) != 0)
        p_x = x_ptr + row.to(tl.int64)[:, None] * stride_xs + o_d[None, :] * stride_xd
        b_x = tl.load(p_x, mask=valid[:, None] & (o_d < DIM)[None, :], other=0.0)
        total += tl.sum(b_x.to(tl.float32), 0)
        count += tl.sum(valid.to(tl.float32), 0)
    p_out = out_ptr + ((b.to(tl.int64) * heads + h) * blocks + i) * DIM + o_d
    tl.store(p_out, total * (scale / tl.maximum(count, 1.0)), mask=o_d < DIM)


@triton.jit
def pool_fwd_kernel(
    x_ptr,
    rows_ptr,
    mask_ptr,
    out_ptr,
    seq,
    heads,
    blocks,
    stride_xb,
    stride_xs,
    stride_xh,
    stride_xd,
    stride_rb,
    stride_rh,
    stride_mb,
    HAS_ROWS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    pool_one(
        x_ptr, rows_ptr, mask_ptr, out_ptr, tl.program_id(0), seq, heads, blocks, 1.0,
        stride_xb, stride_xs, stride_xh, stride_xd, stride_rb, stride_rh, stride_mb,
        HAS_ROWS, HAS_MASK, DIM, DIM_PAD, BLOCK, CHUNK,
    )  # fmt: skip


@triton.jit
def pool_pair_fwd_kernel(
    q_ptr,
    k_ptr,
    rows_ptr,
    mask_ptr,
    q_out_ptr,
    k_out_ptr,
    q_len,
    kv_len,
    heads,
    nq,
    nk,
    q_programs,
    scale,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_kd,
    stride_rb,
    stride_rh,
    stride_mb,
    HAS_ROWS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK_Q: tl.constexpr,
    CHUNK_K: tl.constexpr,
):
    """Query means, scaled, and key means in one launch."""
    pid = tl.program_id(0)
    if pid < q_programs:
        pool_one(
            q_ptr, rows_ptr, mask_ptr, q_out_ptr, pid, q_len, heads, nq, scale,
            stride_qb, stride_qs, stride_qh, stride_qd, stride_rb, stride_rh, stride_mb,
            HAS_ROWS, False, DIM, DIM_PAD, BLOCK_Q, CHUNK_Q,
        )  # fmt: skip
    else:
        pool_one(
            k_ptr, rows_ptr, mask_ptr, k_out_ptr, pid - q_programs, kv_len, heads, nk, 1.0,
            stride_kb, stride_ks, stride_kh, stride_kd, stride_rb, stride_rh, stride_mb,
            HAS_ROWS, HAS_MASK, DIM, DIM_PAD, BLOCK_K, CHUNK_K,
        )  # fmt: skip


@triton.jit
def pool_two_fwd_kernel(
    x_ptr,
    y_ptr,
    rows_ptr,
    mask_ptr,
    out_ptr,
    seq,
    heads,
    blocks,
    programs,
    stride_xb,
    stride_xs,
    stride_xh,
    stride_xd,
    stride_yb,
    stride_ys,
    stride_yh,
    stride_yd,
    stride_rb,
    stride_rh,
    stride_mb,
    HAS_ROWS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Means of two tensors in one launch."""
    pid = tl.program_id(0)
    if pid < programs:
        pool_one(
            x_ptr, rows_ptr, mask_ptr, out_ptr, pid, seq, heads, blocks, 1.0,
            stride_xb, stride_xs, stride_xh, stride_xd, stride_rb, stride_rh, stride_mb,
            HAS_ROWS, HAS_MASK, DIM, DIM_PAD, BLOCK, CHUNK,
        )  # fmt: skip
    else:
        pool_one(
            y_ptr, rows_ptr, mask_ptr, out_ptr + programs.to(tl.int64) * DIM, pid - programs, seq, heads, blocks, 1.0,
            stride_yb, stride_ys, stride_yh, stride_yd, stride_rb, stride_rh, stride_mb,
            HAS_ROWS, HAS_MASK, DIM, DIM_PAD, BLOCK, CHUNK,
        )  # fmt: skip


_POOL, _POOL_PAIR = KeptKernel(pool_fwd_kernel), KeptKernel(pool_pair_fwd_kernel)
_POOL_TWO = KeptKernel(pool_two_fwd_kernel)


def pool_blocks_triton(
    x: torch.Tensor,
    block: int,
    *,
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :func:`dit_accel.kernels.selection.api.pool_blocks`."""
    batch, seq, heads, dim = x.shape
    n = ceil_div(seq, block)
    dim_pad = power_of_two(dim)
    out = torch.empty(batch, heads, n, dim, dtype=torch.float32, device=x.device)
    rows, key_mask = contiguous_rows(rows), contiguous_key_mask(key_mask, batch, seq)
    with torch.cuda.device_of(x):
        _POOL[(batch * heads * n,)](
            x,
            rows,
            key_mask,
            out,
            seq,
            heads,
            n,
            *x.stride(),
            *lead_strides(rows),
            seq,
            HAS_ROWS=rows is not None,
            HAS_MASK=key_mask is not None,
            DIM=dim,
            DIM_PAD=dim_pad,
            BLOCK=block,
            CHUNK=pool_chunk(block, dim_pad),
            num_warps=POOL_WARPS,
        )
    return out


def pool_two_triton(
    x: torch.Tensor,
    y: torch.Tensor,
    block: int,
    *,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See :func:`dit_accel.kernels.selection.api.pool_two`."""
    batch, seq, heads, dim = x.shape
    n = ceil_div(seq, block)
    programs, dim_pad = batch * heads * n, power_of_two(dim)
    out = torch.empty(2, batch, heads, n, dim, dtype=dtype, device=x.device)
    rows, key_mask = contiguous_rows(rows), contiguous_key_mask(key_mask, batch, seq)
    with torch.cuda.device_of(x):
        _POOL_TWO[(2 * programs,)](
            x,
            y,
            rows,
            key_mask,
            out,
            seq,
            heads,
            n,
            programs,
            *x.stride(),
            *y.stride(),
            *lead_strides(rows),
            seq,
            HAS_ROWS=rows is not None,
            HAS_MASK=key_mask is not None,
            DIM=dim,
            DIM_PAD=dim_pad,
            BLOCK=block,
            CHUNK=pool_chunk(block, dim_pad),
            num_warps=POOL_WARPS,
        )
    return out


def pool_pair_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    block_q: int,
    block_k: int,
    *,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``scale`` times the block means of q, ``[B * H, nq, D]``, and those of k, ``[B * H, D, nk]``: ready to multiply.

    Zero blocks of keys follow up to a multiple of 16: rows of scores that start there can be read in wide loads.
    """
    batch, q_len, heads, dim = q.shape
    kv_len = k.shape[1]
    nq, nk = ceil_div(q_len, block_q), ceil_div(ceil_div(kv_len, block_k), 16) * 16
    dim_pad = power_of_two(dim)
    planes = batch * heads
    means = torch.empty(planes * (nq + nk) * dim, dtype=torch.float32, device=q.device)
    q_mean = means.as_strided((planes, nq, dim), (nq * dim, dim, 1))
    k_mean = means.as_strided((planes, dim, nk), (nk * dim, 1, dim), planes * nq * dim)
    rows, key_mask = contiguous_rows(rows), contiguous_key_mask(key_mask, batch, kv_len)
    with torch.cuda.device_of(q):
        _POOL_PAIR[(planes * (nq + nk),)](
            q,
            k,
            rows,
            key_mask,
            q_mean,
            k_mean,
            q_len,
            kv_len,
            heads,
            nq,
            nk,
            planes * nq,
            float(scale),
            *q.stride(),
            *k.stride(),
            *lead_strides(rows),
            kv_len,
            HAS_ROWS=rows is not None,
            HAS_MASK=key_mask is not None,
            DIM=dim,
            DIM_PAD=dim_pad,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            CHUNK_Q=pool_chunk(block_q, dim_pad),
            CHUNK_K=pool_chunk(block_k, dim_pad),
            num_warps=POOL_WARPS,
        )
    return q_mean, k_mean


def pool_chunk(block: int, dim_pad: int) -> int:
    """Rows that a pooling program reads at a time."""
    return min(power_of_two(block), max(16, POOL_ELEMENTS // dim_pad))
