"""Forward kernels of the linear branch; their launchers are in :mod:`.linear`."""

from __future__ import annotations

import triton
import triton.language as tl

from ...common.primitives import slot_rows


@triton.jit
def feature_map(x, valid, in_d, KIND: tl.constexpr, NORMALISE: tl.constexpr, PADDED: tl.constexpr):
    """phi of float32 rows [T, DIM_PAD]; 0 in the padding of the head dim, and in invalid rows if NORMALISE.

    Without NORMALISE softmax leaves its row sums out, which cancel where phi is divided by phi . Z.
    """
    if KIND == "softmax":
        if PADDED:
            x = tl.where(in_d[None, :], x, float("-inf"))
        phi = tl.exp2(x * 1.4426950408889634 - (tl.max(x, 1) * 1.4426950408889634)[:, None])
        if NORMALISE:
            phi = phi * tl.where(valid, 1.0 / tl.sum(phi, 1), 0.0)[:, None]
    elif KIND == "elu":
        phi = tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
        phi = tl.where(valid[:, None] & in_d[None, :], phi, 0.0)
    else:
        phi = tl.maximum(x, 0.0)
    return phi


@triton.jit
def program_index(heads, groups, batch0, head0):
    """Group, batch and head of this program, and its row of head among those of the launch."""
    # Heads run fastest, so that programs in flight together read neighbouring memory of (B, S, H, D).
    pid = tl.program_id(0)
    local_h = pid % heads
    local_b = pid // (heads * groups)
    return (pid // heads) % groups, batch0 + local_b, head0 + local_h, local_b * heads + local_h


@triton.jit
def linear_state_fwd_kernel(
    k_ptr,
    v_ptr,
    rows_ptr,
    mask_ptr,
    weight_ptr,
    state_ptr,
    seq,
    heads,
    groups,
    group_tiles,
    states,
    batch0,
    head0,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_vd,
    stride_rb,
    stride_rh,
    stride_mb,
    stride_wh,
    HAS_ROWS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PROJECT: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    TILES_PER_STATE: tl.constexpr,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """States of ``group_tiles`` tiles of keys: one per block, or (not PER_BLOCK) one for all of them."""
    g, b, h, row_h = program_index(heads, groups, batch0, head0)
    o_d = tl.arange(0, DIM_PAD)
    in_d = o_d < DIM
    ok_h = in_d[:, None] & in_d[None, :]
    k_ptr += b.to(tl.int64) * stride_kb + h.to(tl.int64) * stride_kh
    v_ptr += b.to(tl.int64) * stride_vb + h.to(tl.int64) * stride_vh
    rows_ptr += b * stride_rb + h * stride_rh
    state_ptr += row_h.to(tl.int64) * states * (DIM * DIM + DIM)
    o_state = o_d[:, None] * DIM + o_d[None, :]
    out_dtype: tl.constexpr = state_ptr.dtype.element_ty
    if PROJECT:
        p_w = weight_ptr + h * stride_wh + o_d[None, :] * DIM + o_d[:, None]
        b_w = tl.load(p_w, mask=ok_h, other=0.0)
    tiles = tl.cdiv(seq, TILE)
    first = g * group_tiles
    FOLD: tl.constexpr = 16 if TILE > 16 else TILE
    b_h = tl.zeros([DIM_PAD, DIM_PAD], tl.float32)
    b_z = tl.zeros([FOLD, DIM_PAD], tl.float32)
    for t in range(first, tl.minimum(first + group_tiles, tiles)):
        slot = t * TILE + tl.arange(0, TILE)
        valid = slot < seq
        row = slot_rows(rows_ptr, slot, valid, HAS_ROWS)
        if HAS_MASK:
            valid = valid & (tl.load(mask_ptr + b * stride_mb + row, mask=valid, other=0) != 0)
        row = row.to(tl.int64)[:, None]
        ok = valid[:, None] & in_d[None, :]
        b_k = tl.load(k_ptr + row * stride_ks + o_d[None, :] * stride_kd, mask=ok, other=0.0)
        b_v = tl.load(v_ptr + row * stride_vs + o_d[None, :] * stride_vd, mask=ok, other=0.0)
        if PROJECT:
            b_v = tl.dot(b_v, b_w, input_precision=PRECISION).to(b_v.dtype)
        phi = feature_map(b_k.to(tl.float32), valid, in_d, KIND, True, DIM != DIM_PAD)
        b_h = tl.dot(tl.trans(phi.to(b_v.dtype)), b_v, b_h, input_precision=PRECISION)
        # Rows a thread holds are added as they come, the rest when a state is complete: no exchange per tile.
        b_z += tl.sum(tl.reshape(phi, [TILE // FOLD, FOLD, DIM_PAD]), 0)
        if PER_BLOCK:  # noqa: SIM102 (the first is known at compile time, the second is not)
            if (t % TILES_PER_STATE == TILES_PER_STATE - 1) | (t == tiles - 1):
                p_state = state_ptr + (t // TILES_PER_STATE) * (DIM * DIM + DIM)
                tl.store(p_state + o_state, b_h.to(out_dtype), mask=ok_h)
                tl.store(p_state + DIM * DIM + o_d, tl.sum(b_z, 0).to(out_dtype), mask=in_d)
                b_h = tl.zeros([DIM_PAD, DIM_PAD], tl.float32)
                b_z = tl.zeros([FOLD, DIM_PAD], tl.float32)
    if not PER_BLOCK:
        p_state = state_ptr + g.to(tl.int64) * (DIM * DIM + DIM)
        tl.store(p_state + o_state, b_h.to(out_dtype), mask=ok_h)
        tl.store(p_state + DIM * DIM + o_d, tl.sum(b_z, 0).to(out_dtype), mask=in_d)


@triton.jit
def linear_combine_kernel(
    partial_ptr,
    weight_ptr,
    state_ptr,
    heads,
    splits,
    scale,
    stride_wh,
    PROJECT: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``scale`` times the sum of a head's partial states, projected: ROWS features of it."""
    head = tl.program_id(0)
    f = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, DIM_PAD)
    in_f, in_d = f < DIM, o_d < DIM
    ok = in_f[:, None] & in_d[None, :]
    partial_ptr += head.to(tl.int64) * splits * (DIM * DIM + DIM)
    b_h = tl.zeros([ROWS, DIM_PAD], tl.float32)
    b_z = tl.zeros([ROWS], tl.float32)
    for s in range(0, splits):
        p_part = partial_ptr + s * (DIM * DIM + DIM)
        b_h += tl.load(p_part + f[:, None] * DIM + o_d[None, :], mask=ok, other=0.0)
        b_z += tl.load(p_part + DIM * DIM + f, mask=in_f, other=0.0)
    b_h *= scale
    if PROJECT:
        p_w = weight_ptr + (head % heads) * stride_wh + o_d[None, :] * DIM + o_d[:, None]
        b_w = tl.load(p_w, mask=in_d[:, None] & in_d[None, :], other=0.0).to(tl.float32)
        b_h = tl.dot(b_h, b_w, input_precision=PRECISION)
    out_dtype: tl.constexpr = state_ptr.dtype.element_ty
    state_ptr += head.to(tl.int64) * (DIM * DIM + DIM)
    tl.store(state_ptr + f[:, None] * DIM + o_d[None, :], b_h.to(out_dtype), mask=ok)
    tl.store(state_ptr + DIM * DIM + f, (b_z * scale).to(out_dtype), mask=in_f)


@triton.jit
def linear_out_fwd_kernel(
    q_ptr,
    rows_ptr,
    state_ptr,
    bias_ptr,
    added_ptr,
    out_ptr,
    seq,
    heads,
    groups,
    group_tokens,
    batch0,
    head0,
    eps,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_qd,
    stride_ab,
    stride_as,
    stride_ah,
    stride_ad,
    stride_ob,
    stride_os,
    stride_oh,
    stride_od,
    stride_rb,
    stride_rh,
    stride_state,
    stride_state_g,
    stride_bh,
    HAS_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """phi(q) H / (phi(q) . Z + eps) of the queries that share a state; ADD adds ``added``, which ``out`` may be."""
    g, b, h, row_h = program_index(heads, groups, batch0, head0)
    o_d = tl.arange(0, DIM_PAD)
    in_d = o_d < DIM
    ok_h = in_d[:, None] & in_d[None, :]
    q_ptr += b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh
    added_ptr += b.to(tl.int64) * stride_ab + h.to(tl.int64) * stride_ah
    out_ptr += b.to(tl.int64) * stride_ob + h.to(tl.int64) * stride_oh
    rows_ptr += b * stride_rb + h * stride_rh
    state_ptr += row_h.to(tl.int64) * stride_state + g.to(tl.int64) * stride_state_g
    b_h = tl.load(state_ptr + o_d[:, None] * DIM + o_d[None, :], mask=ok_h, other=0.0)
    b_z = tl.load(state_ptr + DIM * DIM + o_d, mask=in_d, other=0.0).to(tl.float32)
    if KIND == "softmax":
        # Features add up to one, so this is eps added to phi . Z, also for an unnormalised phi.
        b_z += eps
    if HAS_BIAS:
        b_bias = tl.load(bias_ptr + h * stride_bh + o_d, mask=in_d, other=0.0).to(tl.float32)
    first = g * group_tokens
    end = tl.minimum(first + group_tokens, seq)
    for start in range(first, end, TILE):
        slot = start + tl.arange(0, TILE)
        valid = slot < end
        row = slot_rows(rows_ptr, slot, valid, HAS_ROWS).to(tl.int64)[:, None]
        ok = valid[:, None] & in_d[None, :]
        b_q = tl.load(q_ptr + row * stride_qs + o_d[None, :] * stride_qd, mask=ok, other=0.0)
        p_out = out_ptr + row * stride_os + o_d[None, :] * stride_od
        phi = feature_map(b_q.to(tl.float32), valid, in_d, KIND, False, DIM != DIM_PAD)
        den = tl.sum(phi * b_z[None, :], 1)
        if KIND != "softmax":
            den += eps
        inverse = tl.where(den > 0.0, 1.0 / tl.where(den > 0.0, den, 1.0), 0.0)
        b_o = tl.dot(phi.to(b_h.dtype), b_h, input_precision=PRECISION) * inverse[:, None]
        if HAS_BIAS:
            b_o += b_bias[None, :]
        if ADD:
            p_added = added_ptr + row * stride_as + o_d[None, :] * stride_ad
            b_o += tl.load(p_added, mask=ok, other=0.0).to(tl.float32)
        tl.store(p_out, b_o.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def marginal_map_kernel(num_ptr, indices_ptr, map_ptr, width, nk, CHUNK: tl.constexpr):
    """Zero the listed blocks of one row of the map."""
    pid = tl.program_id(0).to(tl.int64)
    count = tl.load(num_ptr + pid)
    for start in range(0, count, CHUNK):
        o = start + tl.arange(0, CHUNK)
        j = tl.load(indices_ptr + pid * width + o, mask=o < count, other=0)
        tl.store(map_ptr + pid * nk + j, tl.zeros([CHUNK], map_ptr.dtype.element_ty), mask=o < count)
