"""Triton kernels of how far a block's tokens lie apart: one read of q or k, in place, through the permutation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...common.compiled import KeptKernel
from ...common.launch import ceil_div, contiguous_key_mask, contiguous_rows, lead_strides, or_stand_in, power_of_two
from ...common.primitives import slot_rows
from .pooling import pool_chunk

WARPS = 2


@triton.jit
def deviation_fwd_kernel(
    x_ptr,
    mean_ptr,
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
    HAS_ROWS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Mean absolute deviation of one block's valid tokens from its mean."""
    pid = tl.program_id(0)
    h = pid % heads
    i = (pid // heads) % blocks
    b = pid // (heads * blocks)
    o_d = tl.arange(0, DIM_PAD)
    x_ptr += b.to(tl.int64) * stride_xb + h.to(tl.int64) * stride_xh
    rows_ptr += b * stride_rb + h * stride_rh
    place = ((b.to(tl.int64) * heads + h) * blocks + i) * DIM + o_d
    mean = tl.load(mean_ptr + place, mask=o_d < DIM, other=0.0)
    total = tl.zeros([DIM_PAD], tl.float32)
    count = 0.0
    for start in tl.static_range(0, BLOCK, CHUNK):
        o_in = start + tl.arange(0, CHUNK)
        slot = i * BLOCK + o_in
        valid = (slot < seq) & (o_in < BLOCK)
        row = slot_rows(rows_ptr, slot, valid, HAS_ROWS).to(tl.int64)
        if HAS_MASK:
            valid = valid & (tl.load(mask_ptr + b.to(tl.int64) * seq + row, mask=valid, other=0) != 0)
        ok = valid[:, None] & (o_d < DIM)[None, :]
        b_x = tl.load(x_ptr + row[:, None] * stride_xs + o_d[None, :] * stride_xd, mask=ok, other=0.0)
        total += tl.sum(tl.where(ok, tl.abs(b_x.to(tl.float32) - mean[None, :]), 0.0), 0)
        count += tl.sum(valid.to(tl.float32), 0)
    tl.store(out_ptr + place, total / tl.maximum(count, 1.0), mask=o_d < DIM)


_DEVIATION = KeptKernel(deviation_fwd_kernel)


def pool_deviation_triton(
    x: torch.Tensor,
    mean: torch.Tensor,
    block: int,
    *,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    """See :func:`dit_accel.kernels.selection.rectified.pool_deviation`."""
    batch, seq, heads, dim = x.shape
    blocks, dim_pad = ceil_div(seq, block), power_of_two(dim)
    mean, rows, key_mask = mean.contiguous(), contiguous_rows(rows), contiguous_key_mask(key_mask, batch, seq)
    out = torch.empty(batch, heads, blocks, dim, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _DEVIATION[(batch * heads * blocks,)](
            x,
            mean,
            or_stand_in(rows, x),
            or_stand_in(key_mask, x),
            out,
            seq,
            heads,
            blocks,
            *x.stride(),
            *lead_strides(rows),
            HAS_ROWS=rows is not None,
            HAS_MASK=key_mask is not None,
            DIM=dim,
            DIM_PAD=dim_pad,
            BLOCK=block,
            CHUNK=pool_chunk(block, dim_pad),
            num_warps=WARPS,
        )
    return out


@triton.jit
def unit_mean_fwd_kernel(
    x_ptr,
    centre_ptr,
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
    HAS_CENTRE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Squared length of the mean of one block's valid tokens, each of length 1."""
    pid = tl.program_id(0)
    h = pid % heads
    i = (pid // heads) % blocks
    b = pid // (heads * blocks)
    o_d = tl.arange(0, DIM_PAD)
    x_ptr += b.to(tl.int64) * stride_xb + h.to(tl.int64) * stride_xh
    rows_ptr += b * stride_rb + h * stride_rh
    centre = tl.zeros([DIM_PAD], tl.float32)
    if HAS_CENTRE:
        centre = tl.load(centre_ptr + (b.to(tl.int64) * heads + h) * DIM + o_d, mask=o_d < DIM, other=0.0)
    total = tl.zeros([DIM_PAD], tl.float32)
    count = 0.0
    for start in tl.static_range(0, BLOCK, CHUNK):
        o_in = start + tl.arange(0, CHUNK)
        slot = i * BLOCK + o_in
        valid = (slot < seq) & (o_in < BLOCK)
        row = slot_rows(rows_ptr, slot, valid, HAS_ROWS).to(tl.int64)
        if HAS_MASK:
            valid = valid & (tl.load(mask_ptr + b.to(tl.int64) * seq + row, mask=valid, other=0) != 0)
        ok = valid[:, None] & (o_d < DIM)[None, :]
        b_x = tl.load(x_ptr + row[:, None] * stride_xs + o_d[None, :] * stride_xd, mask=ok, other=0.0)
        b_x = tl.where(ok, b_x.to(tl.float32) - centre[None, :], 0.0)
        length = tl.maximum(tl.sqrt(tl.sum(b_x * b_x, 1)), 1.1754943508222875e-38)
        total += tl.sum(b_x / length[:, None], 0)
        count += tl.sum(valid.to(tl.float32), 0)
    mean = total / tl.maximum(count, 1.0)
    tl.store(out_ptr + (b.to(tl.int64) * heads + h) * blocks + i, tl.sum(mean * mean, 0))


_UNIT_MEAN = KeptKernel(unit_mean_fwd_kernel)


def self_similarity_triton(
    x: torch.Tensor,
    block: int,
    *,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    centre: torch.Tensor | None,
) -> torch.Tensor:
    """See :func:`dit_accel.kernels.selection.api.self_similarity`."""
    batch, seq, heads, dim = x.shape
    blocks, dim_pad, rows = ceil_div(seq, block), power_of_two(dim), contiguous_rows(rows)
    key_mask = contiguous_key_mask(key_mask, batch, seq)
    centre = None if centre is None else centre.expand(batch, heads, dim).contiguous()
    out = torch.empty(batch, heads, blocks, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _UNIT_MEAN[(batch * heads * blocks,)](
            x,
            or_stand_in(centre, out),
            or_stand_in(rows, x),
            or_stand_in(key_mask, x),
            out,
            seq,
            heads,
            blocks,
            *x.stride(),
            *lead_strides(rows),
            HAS_CENTRE=centre is not None,
            HAS_ROWS=rows is not None,
            HAS_MASK=key_mask is not None,
            DIM=dim,
            DIM_PAD=dim_pad,
            BLOCK=block,
            CHUNK=pool_chunk(block, dim_pad),
            num_warps=WARPS,
        )
    return out


@triton.jit
def run_cosine(
    k_ptr,
    rows_ptr,
    first_slot,
    seq,
    stride_ks,
    stride_kd,
    LEVEL: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean cosine of first and last token over a block's whole runs of LEVEL tokens."""
    o_d = tl.arange(0, DIM_PAD)
    slot = first_slot + tl.arange(0, BLOCK // LEVEL) * LEVEL
    whole = slot + LEVEL - 1 < seq
    ok = whole[:, None] & (o_d < DIM)[None, :]
    first = slot_rows(rows_ptr, slot, whole, HAS_ROWS).to(tl.int64)
    last = slot_rows(rows_ptr, slot + LEVEL - 1, whole, HAS_ROWS).to(tl.int64)
    x = tl.load(k_ptr + first[:, None] * stride_ks + o_d[None, :] * stride_kd, mask=ok, other=0.0).to(tl.float32)
    y = tl.load(k_ptr + last[:, None] * stride_ks + o_d[None, :] * stride_kd, mask=ok, other=0.0).to(tl.float32)
    length_y = tl.sqrt(tl.sum(y * y, 1))
    lengths = tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12) * tl.maximum(length_y, 1e-12)
    cosine = tl.sum(tl.sum(x * y, 1) / lengths, 0)
    return cosine / tl.maximum(tl.sum((length_y > 0.0).to(tl.float32), 0), 1.0)


@triton.jit
def similarity_fwd_kernel(
    k_ptr,
    rows_ptr,
    cap_ptr,
    seq,
    heads,
    blocks,
    threshold_2,
    threshold_4,
    threshold_8,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_kd,
    stride_rb,
    stride_rh,
    HAS_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Coarsest level of one block."""
    pid = tl.program_id(0)
    h = pid % heads
    i = (pid // heads) % blocks
    b = pid // (heads * blocks)
    k_ptr += b.to(tl.int64) * stride_kb + h.to(tl.int64) * stride_kh
    rows_ptr += b * stride_rb + h * stride_rh
    pairs = run_cosine(k_ptr, rows_ptr, i * BLOCK, seq, stride_ks, stride_kd, 2, HAS_ROWS, DIM, DIM_PAD, BLOCK)
    fours = run_cosine(k_ptr, rows_ptr, i * BLOCK, seq, stride_ks, stride_kd, 4, HAS_ROWS, DIM, DIM_PAD, BLOCK)
    eights = run_cosine(k_ptr, rows_ptr, i * BLOCK, seq, stride_ks, stride_kd, 8, HAS_ROWS, DIM, DIM_PAD, BLOCK)
    two = pairs > threshold_2
    four = two & (fours > threshold_4)
    eight = four & (eights > threshold_8)
    cap = 1 + two.to(tl.int32) + 2 * four.to(tl.int32) + 4 * eight.to(tl.int32)
    tl.store(cap_ptr + (b * heads + h) * blocks + i, cap.to(tl.int8))


def similarity_cap_triton(
    k: torch.Tensor, block: int, *, rows: torch.Tensor | None, thresholds: tuple[float, float, float]
) -> torch.Tensor:
    """See :func:`dit_accel.kernels.pyramid.api.similarity_cap`."""
    batch, seq, heads, dim = k.shape
    blocks, rows = ceil_div(seq, block), contiguous_rows(rows)
    cap = torch.empty(batch, heads, blocks, dtype=torch.int8, device=k.device)
    with torch.cuda.device_of(k):
        similarity_fwd_kernel[(batch * heads * blocks,)](
            k,
            or_stand_in(rows, k),
            cap,
            seq,
            heads,
            blocks,
            *thresholds,
            *k.stride(),
            *lead_strides(rows),
            HAS_ROWS=rows is not None,
            DIM=dim,
            DIM_PAD=power_of_two(dim),
            BLOCK=block,
            num_warps=WARPS,
        )
    return cap
