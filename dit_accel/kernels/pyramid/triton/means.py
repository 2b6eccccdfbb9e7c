"""Attention that goes on over means: an online softmax which begins with what attention to the kept blocks ended with.

All queries of a block leave out the same key blocks, so that a bit for each pair of blocks says which means they read,
and neither lists nor token bits of means are made.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...common.capability import compute_capability, is_amd
from ...common.compiled import KeptKernel
from ...common.launch import (
    DOT_PRECISION,
    LOG2_E,
    ceil_div,
    contiguous_rows,
    lead_strides,
    or_stand_in,
    padded_head_dim,
    power_of_two,
    token_strides,
    unit_stride,
)
from ...common.primitives import LN_2_, online_softmax_update, slot_rows
from ..means import BlockMeans
from .forward import fitting_tiles


@triton.jit
def over_means(
    q,
    acc,
    row_max,
    row_sum,
    k_ptr,
    v_ptr,
    visible_ptr,
    kept_ptr,
    first,
    means,
    kv_len,
    scale_log2,
    LOG2_TOKENS: tl.constexpr,
    TOKENS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A step of the online softmax: ``TILE_N`` means, with ``WHOLE`` all there, of as many tokens each, and of heads
    without padding."""
    offs_d = tl.arange(0, BLOCK_D)
    mean = first + tl.arange(0, TILE_N)
    inside = mean < means
    block = mean // PER_BLOCK
    at = mean.to(tl.int64) * HEAD_DIM
    p_k, p_v = k_ptr + at[None, :] + offs_d[:, None], v_ptr + at[:, None] + offs_d[None, :]
    if WHOLE:
        k, v = tl.load(p_k), tl.load(p_v)
    else:
        in_d = offs_d < HEAD_DIM
        k = tl.load(p_k, mask=in_d[:, None] & inside[None, :], other=0.0)
        v = tl.load(p_v, mask=inside[:, None] & in_d[None, :], other=0.0)
    byte = tl.load(kept_ptr + block // 8, mask=inside, other=255).to(tl.int32)
    left_out = ((byte >> (block % 8)) & 1) == 0
    if WHOLE:
        bias = tl.where(left_out, LOG2_TOKENS, float("-inf"))
    else:
        if HAS_VISIBLE:
            count = tl.load(visible_ptr + mean, mask=inside, other=0.0)
        else:
            count = tl.minimum(kv_len - mean * TOKENS, TOKENS).to(tl.float32)
        left_out = left_out & inside & (count > 0.0)
        bias = tl.where(left_out, tl.math.log2(tl.maximum(count, 1.0)), float("-inf"))
    scores = tl.dot(q, k, input_precision=PRECISION) * scale_log2 + bias[None, :]
    p, row_max, row_sum, acc_scale = online_softmax_update(scores, row_max, row_sum, True)
    acc = acc * acc_scale[:, None]
    return tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION), row_max, row_sum


@triton.jit(do_not_specialize=("heads", "q_len", "kv_len", "means", "whole_tiles", "kept_stride_r"))
def left_out_means_fwd_kernel(
    q_ptr,
    out_ptr,
    lse_ptr,
    k_ptr,
    v_ptr,
    visible_ptr,
    kept_ptr,
    rows_ptr,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_ob,
    stride_os,
    stride_oh,
    visible_stride_b,
    visible_stride_h,
    kept_stride_b,
    kept_stride_h,
    kept_stride_r,
    rows_stride_b,
    rows_stride_h,
    heads,
    q_len,
    kv_len,
    means,
    whole_tiles,
    scale_log2,
    BLOCK_Q: tl.constexpr,
    LOG2_TOKENS: tl.constexpr,
    TOKENS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``TILE_Q`` queries of a block of one head, and all means of the head. ``out`` and ``lse`` change in place."""
    tiles: tl.constexpr = (BLOCK_Q + TILE_Q - 1) // TILE_Q
    query_block = tl.program_id(0) // tiles
    plane = tl.program_id(1).to(tl.int64)
    batch, head = plane // heads, plane % heads
    q_ptr += batch * stride_qb + head * stride_qh
    out_ptr += batch * stride_ob + head * stride_oh
    lse_ptr += plane * q_len
    k_ptr += plane * means * HEAD_DIM
    v_ptr += plane * means * HEAD_DIM
    visible_ptr += batch * visible_stride_b + head * visible_stride_h
    kept_ptr += batch * kept_stride_b + head * kept_stride_h + query_block.to(tl.int64) * kept_stride_r
    rows_ptr += batch * rows_stride_b + head * rows_stride_h

    offs_d = tl.arange(0, BLOCK_D)
    in_d = offs_d < HEAD_DIM
    offs_m = (tl.program_id(0) % tiles) * TILE_Q + tl.arange(0, TILE_Q)
    slot = query_block * BLOCK_Q + offs_m
    here = (offs_m < BLOCK_Q) & (slot < q_len)
    row = slot_rows(rows_ptr, slot, here, HAS_ROWS)
    wide = row.to(tl.int64)[:, None]
    live = here[:, None] & in_d[None, :]
    q = tl.load(q_ptr + wide * stride_qs + offs_d[None, :], mask=live, other=0.0)
    lse = tl.load(lse_ptr + row, mask=here, other=float("-inf"))

    # Attention to the kept blocks, as if it were one key: its logit is the log-sum-exp, its value the output. Where
    # that is -inf the first tile makes the sum 0.
    row_max = lse / LN_2_
    row_sum = tl.full([TILE_Q], 1.0, tl.float32)
    out_ptrs = out_ptr + wide * stride_os + offs_d[None, :]
    acc = tl.load(out_ptrs, mask=live, other=0.0).to(tl.float32)
    if SPLIT:
        for tile in range(0, whole_tiles):
            acc, row_max, row_sum = over_means(
                q, acc, row_max, row_sum, k_ptr, v_ptr, visible_ptr, kept_ptr, tile * TILE_N, means, kv_len,
                scale_log2, LOG2_TOKENS, TOKENS, PER_BLOCK, TILE_N, BLOCK_D, HEAD_DIM, True, False, PRECISION,
            )  # fmt: skip
    for first in range(whole_tiles * TILE_N, means, TILE_N):
        acc, row_max, row_sum = over_means(
            q, acc, row_max, row_sum, k_ptr, v_ptr, visible_ptr, kept_ptr, first, means, kv_len, scale_log2,
            LOG2_TOKENS, TOKENS, PER_BLOCK, TILE_N, BLOCK_D, HEAD_DIM, False, HAS_VISIBLE, PRECISION,
        )  # fmt: skip

    nothing = row_sum == 0.0
    total = tl.where(nothing, 1.0, row_sum)
    tl.store(out_ptrs, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=live)
    tl.store(lse_ptr + row, tl.where(nothing, float("-inf"), (row_max + tl.math.log2(total)) * LN_2_), mask=here)


def _tiles(q: torch.Tensor, block_q: int) -> tuple[int, int, int]:
    """Queries and means of a tile, and tiles of means on their way: as many as registers and shared memory hold.

    Loads of heads that are no whole 16 columns and products of float32 take more registers. On an H200 64 queries with
    three tiles of 32 means take 0.38 ms, with tiles of 64 means 0.42, and 128 queries with them 0.47 (32,760 tokens, 12
    heads of 128). At 118,800 tokens and 24 heads all three take 8.2 to 8.9 ms, though 128 queries read half as often.
    """
    dim, rows = q.shape[-1], max(16, power_of_two(block_q))
    if q.element_size() > 2:
        return *fitting_tiles(q, min(rows, 32), 16, 1), 2
    of_warpgroups = q.is_cuda and not is_amd() and compute_capability(q.device.index or 0)[0] in (9, 10)
    at_once = 64 if of_warpgroups or (dim <= 128 and dim % 16 == 0) else 32
    means = 32 if dim > 128 or (of_warpgroups and dim % 16 == 0) else 64
    return *fitting_tiles(q, min(rows, at_once), means, 1), 3 if of_warpgroups and dim <= 128 else 2


_KERNEL = KeptKernel(left_out_means_fwd_kernel)


def add_left_out_means_triton(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    means: BlockMeans,
    kept: torch.Tensor,
    block_q: int,
    rows: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`dit_accel.kernels.pyramid.means.add_left_out_means`; ``lse`` is float32."""
    batch, q_len, heads, dim = q.shape
    q, out, lse, kept, rows = (
        unit_stride(q),
        unit_stride(out),
        lse.contiguous(),
        unit_stride(kept),
        contiguous_rows(rows),
    )
    keys, values = (x.to(q.dtype).contiguous() for x in (means.keys, means.values))
    visible = None if means.visible is None else unit_stride(means.visible)
    tile_q, tile_means, stages = _tiles(q, block_q)
    # Means with all their tokens need no masks, in a loop of their own, for which not all cards have registers.
    split = visible is None and padded_head_dim(dim) == dim and not is_amd()
    whole = means.kv_len // means.tokens // tile_means if split else 0
    with torch.cuda.device_of(q):
        _KERNEL[(kept.shape[2] * ceil_div(block_q, tile_q), batch * heads)](
            q,
            out,
            lse,
            keys,
            values,
            or_stand_in(visible, q),
            kept,
            or_stand_in(rows, q),
            *token_strides(q, out),
            *lead_strides(visible),
            *lead_strides(kept),
            kept.stride(2),
            *lead_strides(rows),
            heads,
            q_len,
            means.kv_len,
            keys.shape[2],
            whole,
            scale * LOG2_E,
            BLOCK_Q=block_q,
            LOG2_TOKENS=math.log2(means.tokens),
            TOKENS=means.tokens,
            PER_BLOCK=means.block_k // means.tokens,
            TILE_Q=tile_q,
            TILE_N=tile_means,
            BLOCK_D=padded_head_dim(dim),
            HEAD_DIM=dim,
            SPLIT=split,
            HAS_ROWS=rows is not None,
            HAS_VISIBLE=visible is not None,
            PRECISION=DOT_PRECISION,
            num_warps=4,
            num_stages=stages,
        )
    return out, lse
