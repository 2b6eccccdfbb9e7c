"""Backward kernels of the linear branch; their launchers and formulas are in :mod:`.linear_backward`."""

from __future__ import annotations

import triton
import triton.language as tl

from ...common.primitives import slot_rows
from .forward_kernels import feature_map, program_index


@triton.jit
def feature_map_backward(x, phi, dphi, KIND: tl.constexpr):
    """dx from dphi, all float32 [T, DIM_PAD]."""
    if KIND == "softmax":
        dx = phi * (dphi - tl.sum(phi * dphi, 1)[:, None])
    elif KIND == "elu":
        dx = dphi * tl.where(x > 0, 1.0, phi)
    else:
        dx = tl.where(x > 0, dphi, 0.0)
    return dx


@triton.jit
def linear_dq_bwd_kernel(
    q_ptr,
    do_ptr,
    rows_ptr,
    state_ptr,
    dq_ptr,
    dstate_ptr,
    seq,
    heads,
    groups,
    group_tokens,
    batch0,
    head0,
    eps,
    gain,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_qd,
    stride_gb,
    stride_gs,
    stride_gh,
    stride_gd,
    stride_db,
    stride_ds,
    stride_dh,
    stride_dd,
    stride_rb,
    stride_rh,
    stride_state,
    stride_state_g,
    HAS_ROWS: tl.constexpr,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of a group of queries, and ``gain`` times the gradient of the state that they read."""
    g, b, h, row_h = program_index(heads, groups, batch0, head0)
    o_d = tl.arange(0, DIM_PAD)
    in_d = o_d < DIM
    ok_h = in_d[:, None] & in_d[None, :]
    q_ptr += b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh
    do_ptr += b.to(tl.int64) * stride_gb + h.to(tl.int64) * stride_gh
    dq_ptr += b.to(tl.int64) * stride_db + h.to(tl.int64) * stride_dh
    rows_ptr += b * stride_rb + h * stride_rh
    state_ptr += row_h.to(tl.int64) * stride_state + g.to(tl.int64) * stride_state_g
    b_h = tl.load(state_ptr + o_d[:, None] * DIM + o_d[None, :], mask=ok_h, other=0.0)
    b_z = tl.load(state_ptr + DIM * DIM + o_d, mask=in_d, other=0.0).to(tl.float32)
    b_dh = tl.zeros([DIM_PAD, DIM_PAD], tl.float32)
    b_dz = tl.zeros([DIM_PAD], tl.float32)
    first = g * group_tokens
    end = tl.minimum(first + group_tokens, seq)
    for start in range(first, end, TILE):
        slot = start + tl.arange(0, TILE)
        valid = slot < end
        row = slot_rows(rows_ptr, slot, valid, HAS_ROWS).to(tl.int64)[:, None]
        ok = valid[:, None] & in_d[None, :]
        b_q = tl.load(q_ptr + row * stride_qs + o_d[None, :] * stride_qd, mask=ok, other=0.0).to(tl.float32)
        b_do = tl.load(do_ptr + row * stride_gs + o_d[None, :] * stride_gd, mask=ok, other=0.0)
        phi = feature_map(b_q, valid, in_d, KIND, True, DIM != DIM_PAD)
        den = tl.sum(phi * b_z[None, :], 1) + eps
        inverse = tl.where(den > 0.0, 1.0 / tl.where(den > 0.0, den, 1.0), 0.0)
        dphi = tl.dot(b_do, tl.trans(b_h), input_precision=PRECISION)
        # rowsum(dO * O), taken from this product: O would need one of its own.
        delta = tl.sum(phi * dphi, 1) * inverse
        dphi = (dphi - delta[:, None] * b_z[None, :]) * inverse[:, None]
        b_dq = feature_map_backward(b_q, phi, dphi, KIND)
        p_dq = dq_ptr + row * stride_ds + o_d[None, :] * stride_dd
        tl.store(p_dq, b_dq.to(dq_ptr.dtype.element_ty), mask=ok)
        share = phi * (inverse * gain)[:, None]
        b_dh += tl.dot(tl.trans(share.to(b_do.dtype)), b_do, input_precision=PRECISION)
        b_dz -= tl.sum(share * delta[:, None], 0)
    p_dstate = dstate_ptr + (row_h.to(tl.int64) * groups + g) * (DIM * DIM + DIM)
    out_dtype: tl.constexpr = dstate_ptr.dtype.element_ty
    tl.store(p_dstate + o_d[:, None] * DIM + o_d[None, :], b_dh.to(out_dtype), mask=ok_h)
    tl.store(p_dstate + DIM * DIM + o_d, b_dz.to(out_dtype), mask=in_d)


@triton.jit
def linear_dkv_bwd_kernel(
    k_ptr,
    v_ptr,
    rows_ptr,
    mask_ptr,
    dstate_ptr,
    dk_ptr,
    dv_ptr,
    seq,
    heads,
    tiles,
    batch0,
    head0,
    scale,
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
    stride_state,
    stride_state_t,
    HAS_ROWS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    KIND: tl.constexpr,
    TILES_PER_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv (which share strides) of one tile of keys from ``scale`` times its summed state gradient."""
    t, b, h, row_h = program_index(heads, tiles, batch0, head0)
    o_d = tl.arange(0, DIM_PAD)
    in_d = o_d < DIM
    ok_h = in_d[:, None] & in_d[None, :]
    slot = t * TILE + tl.arange(0, TILE)
    valid = slot < seq
    row = slot_rows(rows_ptr + b * stride_rb + h * stride_rh, slot, valid, HAS_ROWS)
    seen = valid
    if HAS_MASK:
        seen = valid & (tl.load(mask_ptr + b * stride_mb + row, mask=valid, other=0) != 0)
    row = row.to(tl.int64)[:, None]
    ok = seen[:, None] & in_d[None, :]
    k_ptr += b.to(tl.int64) * stride_kb + h.to(tl.int64) * stride_kh
    v_ptr += b.to(tl.int64) * stride_vb + h.to(tl.int64) * stride_vh
    dstate_ptr += row_h.to(tl.int64) * stride_state + (t // TILES_PER_BLOCK).to(tl.int64) * stride_state_t
    b_k = tl.load(k_ptr + row * stride_ks + o_d[None, :] * stride_kd, mask=ok, other=0.0).to(tl.float32)
    b_v = tl.load(v_ptr + row * stride_vs + o_d[None, :] * stride_vd, mask=ok, other=0.0)
    b_g = tl.load(dstate_ptr + o_d[:, None] * DIM + o_d[None, :], mask=ok_h, other=0.0)
    b_gz = tl.load(dstate_ptr + DIM * DIM + o_d, mask=in_d, other=0.0).to(tl.float32)
    phi = feature_map(b_k, valid, in_d, KIND, True, DIM != DIM_PAD)
    dphi = tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION) + b_gz[None, :]
    b_dk = tl.where(ok, feature_map_backward(b_k, phi, dphi * scale, KIND), 0.0)
    b_dv = tl.where(ok, tl.dot(phi.to(b_g.dtype), b_g, input_precision=PRECISION) * scale, 0.0)
    # Hidden tokens get gradients too: zeros.
    ok_out = valid[:, None] & in_d[None, :]
    o_out = b.to(tl.int64) * stride_ob + h.to(tl.int64) * stride_oh + row * stride_os + o_d[None, :] * stride_od
    tl.store(dk_ptr + o_out, b_dk.to(dk_ptr.dtype.element_ty), mask=ok_out)
    tl.store(dv_ptr + o_out, b_dv.to(dv_ptr.dtype.element_ty), mask=ok_out)
