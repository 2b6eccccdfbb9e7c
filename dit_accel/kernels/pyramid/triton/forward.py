"""Triton forward of pyramid attention: one online softmax over rows gathered from four levels.

PSA concatenates several short pooled blocks into one hardware tile. Here a tile is always ``TILE`` gathered
rows: row ``n`` of a level's tile belongs to list entry ``n // (block_k / level)``, so that every level fills
its tiles whatever its block size, and the matrix shapes never change.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...common.capability import shared_memory
from ...common.launch import (
    DOT_PRECISION,
    LOG2_E,
    ceil_div,
    contiguous_key_mask,
    contiguous_rows,
    lead_strides,
    or_stand_in,
    padded_head_dim,
    power_of_two,
)
from ...common.primitives import online_softmax_update, slot_rows
from ..levels import LEVELS

TILE = 64
TABLE_BYTES = 2048  # of shared memory: counts, rows and sums


@triton.jit
def pyramid_pool_kernel(
    x_ptr,
    rows_ptr,
    mask_ptr,
    out_ptr,
    count_ptr,
    seq,
    heads,
    tiles,
    runs,
    start4,
    start8,
    stride_xb,
    stride_xs,
    stride_xh,
    stride_xd,
    stride_rb,
    stride_rh,
    stride_mb,
    HAS_ROWS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """Means of runs of 2, 4 and 8 of TILE slots, in one read; rows of level 2, then 4, then 8."""
    pid = tl.program_id(0)
    h = pid % heads
    t = (pid // heads) % tiles
    b = pid // (heads * tiles)
    o_d = tl.arange(0, DIM_PAD)
    in_d = o_d < DIM
    slot = t * TILE + tl.arange(0, TILE)
    valid = slot < seq
    row = slot_rows(rows_ptr + b * stride_rb + h * stride_rh, slot, valid, HAS_ROWS)
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + b * stride_mb + row, mask=valid, other=0) != 0)
    x_ptr += b.to(tl.int64) * stride_xb + h.to(tl.int64) * stride_xh
    p_x = x_ptr + row.to(tl.int64)[:, None] * stride_xs + o_d[None, :] * stride_xd
    total = tl.load(p_x, mask=valid[:, None] & in_d[None, :], other=0.0).to(tl.float32)
    count = valid.to(tl.float32)
    head = (b.to(tl.int64) * heads + h) * runs
    start = 0
    for step in tl.static_range(1, 4):
        total = tl.sum(tl.reshape(total, [TILE >> step, 2, DIM_PAD]), 1)
        count = tl.sum(tl.reshape(count, [TILE >> step, 2]), 1)
        run = t * (TILE >> step) + tl.arange(0, TILE >> step)
        inside = run < (seq + (1 << step) - 1) // (1 << step)
        mean = total / tl.maximum(count, 1.0)[:, None]
        p_out = out_ptr + (head + start + run)[:, None] * DIM + o_d[None, :]
        tl.store(p_out, mean.to(out_ptr.dtype.element_ty), mask=inside[:, None] & in_d[None, :])
        tl.store(count_ptr + head + start + run, count, mask=inside)
        start = start4 if step == 1 else start8


@triton.jit
def pyramid_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_pool_ptr,
    v_pool_ptr,
    count_ptr,
    rows_ptr,
    mask_ptr,
    indices_ptr,
    num_ptr,
    out_ptr,
    lse_ptr,
    q_len,
    kv_len,
    heads,
    tiles,
    nq,
    nk,
    runs,
    start4,
    start8,
    scale,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_vd,
    stride_ob,
    stride_os,
    stride_oh,
    stride_od,
    stride_rb,
    stride_rh,
    stride_mb,
    stride_ib,
    stride_ih,
    stride_nb,
    stride_nh,
    HAS_ROWS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    t = pid % tiles
    h = (pid // tiles) % heads
    b = pid // (tiles * heads)
    i = t * TILE_Q // BLOCK_Q
    o_d = tl.arange(0, DIM_PAD)
    in_d = o_d < DIM
    slot_q = t * TILE_Q + tl.arange(0, TILE_Q)
    in_q = slot_q < q_len
    row_q = slot_q
    rows_ptr += b * stride_rb + h * stride_rh
    if HAS_ROWS:
        row_q = tl.load(rows_ptr + slot_q, mask=in_q, other=0)
    q_ptr += b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh
    k_ptr += b.to(tl.int64) * stride_kb + h.to(tl.int64) * stride_kh
    v_ptr += b.to(tl.int64) * stride_vb + h.to(tl.int64) * stride_vh
    head = (b.to(tl.int64) * heads + h) * runs
    p_q = q_ptr + row_q.to(tl.int64)[:, None] * stride_qs + o_d[None, :] * stride_qd
    ok_q = in_q[:, None] & in_d[None, :]
    b_q = tl.load(p_q, mask=ok_q, other=0.0)
    p_list = indices_ptr + b.to(tl.int64) * stride_ib + h.to(tl.int64) * stride_ih + i.to(tl.int64) * nk
    p_num = num_ptr + b.to(tl.int64) * stride_nb + h.to(tl.int64) * stride_nh + i * 4

    row_max = tl.full([TILE_Q], -1e30, tl.float32)
    row_sum = tl.zeros([TILE_Q], tl.float32)
    acc = tl.zeros([TILE_Q, DIM_PAD], tl.float32)
    begin = 0
    for step in tl.static_range(0, 4):
        listed = tl.load(p_num + step)
        length = (kv_len + (1 << step) - 1) // (1 << step)
        base = head
        if step == 2:
            base = head + start4
        if step == 3:
            base = head + start8
        for first in range(0, listed * (BLOCK_K >> step), TILE):
            o = first + tl.arange(0, TILE)
            ok = o < listed * (BLOCK_K >> step)
            run = tl.load(p_list + begin + o // (BLOCK_K >> step), mask=ok, other=0)
            run = run * (BLOCK_K >> step) + o % (BLOCK_K >> step)
            ok = ok & (run < length)
            if step == 0:
                row = slot_rows(rows_ptr, run, ok, HAS_ROWS)
                if HAS_MASK:
                    ok = ok & (tl.load(mask_ptr + b * stride_mb + row, mask=ok, other=0) != 0)
                row = row.to(tl.int64)[:, None]
                p_k = k_ptr + row * stride_ks + o_d[None, :] * stride_kd
                p_v = v_ptr + row * stride_vs + o_d[None, :] * stride_vd
            else:
                count = tl.load(count_ptr + base + run, mask=ok, other=0.0)
                ok = ok & (count > 0.0)
                row = (base + run)[:, None]
                p_k = k_pool_ptr + row * DIM + o_d[None, :]
                p_v = v_pool_ptr + row * DIM + o_d[None, :]
            b_k = tl.load(p_k, mask=ok[:, None] & in_d[None, :], other=0.0)
            b_v = tl.load(p_v, mask=ok[:, None] & in_d[None, :], other=0.0)
            s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
            if step > 0:
                s += tl.log2(tl.maximum(count, 1.0))[None, :]
            s = tl.where(ok[None, :], s, float("-inf"))
            p, row_max, row_sum, acc_scale = online_softmax_update(s, row_max, row_sum, False)
            acc = acc * acc_scale[:, None]
            acc = tl.dot(p.to(b_v.dtype), b_v, acc, input_precision=PRECISION)
        begin += listed
    some = row_sum > 0.0
    out = acc * tl.where(some, 1.0 / tl.where(some, row_sum, 1.0), 0.0)[:, None]
    o_out = b.to(tl.int64) * stride_ob + h.to(tl.int64) * stride_oh
    p_out = out_ptr + o_out + row_q.to(tl.int64)[:, None] * stride_os + o_d[None, :] * stride_od
    tl.store(p_out, out.to(out_ptr.dtype.element_ty), mask=ok_q)
    lse = (row_max + tl.log2(tl.where(some, row_sum, 1.0))) / 1.4426950408889634
    p_lse = lse_ptr + (b.to(tl.int64) * heads + h) * q_len + row_q
    tl.store(p_lse, tl.where(some, lse, float("-inf")), mask=in_q)


def fitting_tiles(x: torch.Tensor, kept: int, walked: int, kinds: int, *, least_kept: int = 16) -> tuple[int, int]:
    """Rows of a tile that a program keeps, and of one that it walks along, in the shared memory of a GPU.

    Args:
        x: ``[..., D]``, of the dtype and the device of all tiles.
        kept, walked: what both are where they fit; smaller ones are halves.
        kinds: tensors of which rows are kept; two are walked along.
        least_kept: below this many no half is taken.
    """
    if not x.is_cuda:  # interpreted
        return kept, walked
    limit, element = shared_memory(x.device.index or 0), x.element_size()
    row = padded_head_dim(x.shape[-1]) * element
    for least in (32, 16):
        while kinds * kept * row + 2 * walked * row + kept * walked * element + TABLE_BYTES > limit:
            if walked > least:
                walked //= 2
            elif kept > max(least, least_kept):
                kept //= 2
            else:
                break
    return kept, walked


def pool_pyramid(
    x: torch.Tensor, rows: torch.Tensor | None, key_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    """Means ``[B, H, runs, D]`` in x's dtype, token counts ``[B, H, runs]``, starts of levels 4 and 8."""
    batch, seq, heads, dim = x.shape
    sizes = [ceil_div(seq, level) for level in LEVELS[1:]]
    start4, start8, runs = sizes[0], sizes[0] + sizes[1], sum(sizes)
    out = torch.empty(batch, heads, runs, dim, dtype=x.dtype, device=x.device)
    count = torch.empty(batch, heads, runs, dtype=torch.float32, device=x.device)
    tiles = ceil_div(seq, TILE)
    with torch.cuda.device_of(x):
        pyramid_pool_kernel[(batch * heads * tiles,)](
            x,
            or_stand_in(rows, x),
            or_stand_in(key_mask, x),
            out,
            count,
            seq,
            heads,
            tiles,
            runs,
            start4,
            start8,
            *x.stride(),
            *lead_strides(rows),
            seq,
            HAS_ROWS=rows is not None,
            HAS_MASK=key_mask is not None,
            TILE=TILE,
            DIM=dim,
            DIM_PAD=power_of_two(dim),
            num_warps=4,
        )
    return out, count, (start4, start8)


def level_lists(levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Key blocks ordered by level (1, 2, 4, 8, then those not read), and how many have each level.

    Returns:
        int32 ``[B, H, nq, nk]`` and int32 ``[B, H, nq, 4]``.
    """
    match = torch.stack([levels == level for level in LEVELS], -1)
    rank = torch.where(match, torch.arange(4, dtype=torch.int8, device=levels.device), 4).amin(-1)
    lists = rank.argsort(dim=-1, stable=True).to(torch.int32)
    return lists.contiguous(), match.sum(-2, dtype=torch.int32).contiguous()


def pyramid_attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    levels: torch.Tensor,
    block_q: int,
    block_k: int,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`dit_accel.kernels.pyramid.api.pyramid_attention`, whose checked arguments this takes."""
    batch, q_len, heads, dim = q.shape
    kv_len = k.shape[1]
    rows = contiguous_rows(rows)
    key_mask = contiguous_key_mask(key_mask, batch, kv_len)
    k_pool, count, (start4, start8) = pool_pyramid(k, rows, key_mask)
    v_pool, _, _ = pool_pyramid(v, rows, key_mask)
    lists, num = level_lists(levels)
    tile_q, tile = fitting_tiles(q, min(block_q, 128), TILE, 1)
    tiles = ceil_div(q_len, tile_q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        pyramid_fwd_kernel[(batch * heads * tiles,)](
            q,
            k,
            v,
            k_pool,
            v_pool,
            count,
            or_stand_in(rows, q),
            or_stand_in(key_mask, q),
            lists,
            num,
            out,
            lse,
            q_len,
            kv_len,
            heads,
            tiles,
            num.shape[2],
            lists.shape[-1],
            k_pool.shape[2],
            start4,
            start8,
            scale * LOG2_E,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *out.stride(),
            *lead_strides(rows),
            kv_len,
            *lead_strides(lists),
            *lead_strides(num),
            HAS_ROWS=rows is not None,
            HAS_MASK=key_mask is not None,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            TILE_Q=tile_q,
            TILE=tile,
            DIM=dim,
            DIM_PAD=padded_head_dim(dim),
            PRECISION=DOT_PRECISION,
            num_warps=8 if min(block_q, 128) >= 128 else 4,
            num_stages=2,
        )
    return out, lse
