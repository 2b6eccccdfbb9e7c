"""Triton backward of the linear branch, and its autograd function.

With a = phi(q) and den = a . Z + eps, per query block: ``dH = (a / den)^T dO``, ``dZ = -(a / den)^T D`` and
``dphi(q) = (dO H^T - D Z^T) / den`` where ``D = rowsum(dO * O)``. Per key block, with G and g the sums of dH
and dZ over the query blocks that count it as marginal (the transposed matrix product of the forward):
``dphi(k) = V G^T + 1 g^T``, ``dV = phi(k) G``. States are recomputed, not saved; nothing is atomic, so
gradients are the same from run to run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .block_mask import BlockMask
from .triton_linear import (
    SPLITS,
    Shape,
    all_states,
    feature_map,
    head_chunks,
    head_view,
    launch_states,
    linear_forward,
    map_scale,
    scaled_map,
    shape_of,
    slot_rows,
)
from .triton_pooling import lead_strides


@triton.jit
def feature_map_backward(x, phi, dphi, KIND: tl.constexpr):
    """dx from dphi, all float32 [T, DIM_PAD]."""
    if KIND == "softmax":
        dx = phi * (dphi - tl.sum(phi * dphi, 1)[:, None])
    elif KIND == "elu":
        dx = dphi * tl.where(x > 0, 1.0, tl.exp(tl.minimum(x, 0.0)))
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
    stride_state_i,
    HAS_ROWS: tl.constexpr,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of a group of queries, and ``gain`` times the gradient of the state that they read."""
    pid = tl.program_id(0)
    h = pid % heads
    g = (pid // heads) % groups
    b = pid // (heads * groups)
    o_d = tl.arange(0, DIM_PAD)
    in_d = o_d < DIM
    ok_h = in_d[:, None] & in_d[None, :]
    q_ptr += b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh
    do_ptr += b.to(tl.int64) * stride_gb + h.to(tl.int64) * stride_gh
    dq_ptr += b.to(tl.int64) * stride_db + h.to(tl.int64) * stride_dh
    rows_ptr += b * stride_rb + h * stride_rh
    state_ptr += (b.to(tl.int64) * heads + h) * stride_state + g * stride_state_i
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
        phi = feature_map(b_q, in_d, KIND)
        phi_low = phi.to(b_h.dtype)
        den = tl.sum(phi_low.to(tl.float32) * b_z[None, :], 1) + eps
        inverse = tl.where(den > 0.0, 1.0 / tl.where(den > 0.0, den, 1.0), 0.0)
        b_o = tl.dot(phi_low, b_h, input_precision=PRECISION) * inverse[:, None]
        delta = tl.sum(b_do.to(tl.float32) * b_o, 1)
        dphi = tl.dot(b_do, tl.trans(b_h), input_precision=PRECISION)
        dphi = (dphi - delta[:, None] * b_z[None, :]) * inverse[:, None]
        b_dq = feature_map_backward(b_q, phi, dphi, KIND)
        p_dq = dq_ptr + row * stride_ds + o_d[None, :] * stride_dd
        tl.store(p_dq, b_dq.to(dq_ptr.dtype.element_ty), mask=ok)
        share = phi * (inverse * gain)[:, None]
        b_dh += tl.dot(tl.trans(share.to(b_do.dtype)), b_do, input_precision=PRECISION)
        b_dz -= tl.sum(share * delta[:, None], 0)
    p_dstate = dstate_ptr + ((b.to(tl.int64) * heads + h) * groups + g) * (DIM * DIM + DIM)
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
    stride_state_i,
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
    pid = tl.program_id(0)
    h = pid % heads
    t = (pid // heads) % tiles
    b = pid // (heads * tiles)
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
    dstate_ptr += (b.to(tl.int64) * heads + h) * stride_state + (t // TILES_PER_BLOCK) * stride_state_i
    b_k = tl.load(k_ptr + row * stride_ks + o_d[None, :] * stride_kd, mask=ok, other=0.0).to(tl.float32)
    b_v = tl.load(v_ptr + row * stride_vs + o_d[None, :] * stride_vd, mask=ok, other=0.0)
    b_g = tl.load(dstate_ptr + o_d[:, None] * DIM + o_d[None, :], mask=ok_h, other=0.0)
    b_gz = tl.load(dstate_ptr + DIM * DIM + o_d, mask=in_d, other=0.0).to(tl.float32)
    phi = feature_map(b_k, in_d, KIND)
    dphi = tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION) + b_gz[None, :]
    b_dk = tl.where(ok, feature_map_backward(b_k, phi, dphi * scale, KIND), 0.0)
    b_dv = tl.where(ok, tl.dot(phi.to(b_g.dtype), b_g, input_precision=PRECISION) * scale, 0.0)
    # Hidden tokens get gradients too: zeros.
    ok_out = valid[:, None] & in_d[None, :]
    o_out = (
        b.to(tl.int64) * stride_ob + h.to(tl.int64) * stride_oh + row * stride_os + o_d[None, :] * stride_od
    )
    tl.store(dk_ptr + o_out, b_dk.to(dk_ptr.dtype.element_ty), mask=ok_out)
    tl.store(dv_ptr + o_out, b_dv.to(dv_ptr.dtype.element_ty), mask=ok_out)


def launch_dq(
    q: torch.Tensor,
    grad: torch.Tensor,
    rows: torch.Tensor | None,
    states: torch.Tensor,
    dq: torch.Tensor,
    shape: Shape,
    kind: str,
    group_tokens: int,
    dtype: torch.dtype,
    eps: float,
    gain: float,
) -> torch.Tensor:
    """Fill ``dq``; returns the state gradients ``[B, H, groups, D * D + D]``."""
    batch, seq, heads, _ = q.shape
    groups = triton.cdiv(seq, group_tokens)
    dstates = torch.empty(batch, heads, groups, shape.state_width, dtype=dtype, device=q.device)
    with torch.cuda.device_of(q):
        linear_dq_bwd_kernel[(batch * heads * groups,)](
            q,
            grad,
            rows if rows is not None else q,
            states,
            dq,
            dstates,
            seq,
            heads,
            groups,
            group_tokens,
            eps,
            gain,
            *q.stride(),
            *grad.stride(),
            *dq.stride(),
            *lead_strides(rows),
            states.shape[2] * shape.state_width,
            0 if states.shape[2] == 1 else shape.state_width,
            HAS_ROWS=rows is not None,
            KIND=kind,
            TILE=min(shape.tile_q, 64),
            num_warps=8 if shape.dim > 64 else 4,
            num_stages=1,
            **shape.constants,
        )
    return dstates


def launch_dkv(
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    dstates: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    shape: Shape,
    kind: str,
    scale: float,
) -> None:
    """Fill ``dk`` and ``dv`` from the summed state gradients."""
    batch, seq, heads, _ = k.shape
    tiles = triton.cdiv(seq, shape.tile_k)
    with torch.cuda.device_of(k):
        linear_dkv_bwd_kernel[(batch * heads * tiles,)](
            k,
            v,
            rows if rows is not None else k,
            key_mask if key_mask is not None else k,
            dstates,
            dk,
            dv,
            seq,
            heads,
            tiles,
            scale,
            *k.stride(),
            *v.stride(),
            *dk.stride(),
            *lead_strides(rows),
            *lead_strides(key_mask)[:1],
            dstates.shape[2] * shape.state_width,
            0 if dstates.shape[2] == 1 else shape.state_width,
            HAS_ROWS=rows is not None,
            HAS_MASK=key_mask is not None,
            KIND=kind,
            TILES_PER_BLOCK=shape.block_k // shape.tile_k,
            TILE=shape.tile_k,
            num_warps=8 if shape.dim > 64 else 4,
            **shape.constants,
        )


def linear_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    critical: BlockMask | None,
    negligible: BlockMask | None,
    kind: str,
    rows: torch.Tensor | None,
    k_rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, contiguous, in their dtypes."""
    shape = shape_of(q, critical)
    rows = None if rows is None else rows.contiguous()
    k_rows = None if k_rows is None else k_rows.contiguous()
    key_mask = None if key_mask is None else key_mask.expand(k.shape[:2]).contiguous()
    grad = grad.to(q.dtype)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    if critical is None:
        batch, seq, heads, _ = q.shape
        states = all_states(k, v, key_mask, shape, kind)
        group = triton.cdiv(triton.cdiv(seq, max(1, SPLITS // (batch * heads))), shape.tile_q) * shape.tile_q
        partial = launch_dq(
            q, grad, rows, states, dq, shape, kind, group, torch.float32, eps / k.shape[1], 1.0
        )
        dstates = partial.sum(2, keepdim=True).to(q.dtype)
        launch_dkv(k, v, None, key_mask, dstates, dk, dv, shape, kind, 1.0 / k.shape[1])
        return dq, dk, dv
    scale = map_scale(critical.num_blocks[1])
    marginal = scaled_map(critical, negligible, q.dtype, scale)
    for b, heads in head_chunks(q, k, shape, 2):
        q_h, k_h, v_h, grad_h, dq_h, dk_h, dv_h = (
            x[b : b + 1, :, heads] for x in (q, k, v, grad, dq, dk, dv)
        )
        mask_h = None if key_mask is None else key_mask[b : b + 1]
        rows_h, k_rows_h = head_view(rows, b, heads, 1), head_view(k_rows, b, heads, 1)
        map_h = head_view(marginal, b, heads, 1)
        states = launch_states(k_h, v_h, k_rows_h, mask_h, shape, kind, shape.block_k, q.dtype)
        sums = torch.matmul(map_h, states)
        # The gain keeps summed gradients within float16's range until the last kernel takes it out again.
        dsums = launch_dq(
            q_h, grad_h, rows_h, sums, dq_h, shape, kind, shape.block_q, q.dtype, eps * scale, 1.0 / scale
        )
        dstates = torch.matmul(map_h.transpose(-1, -2), dsums)
        launch_dkv(k_h, v_h, k_rows_h, mask_h, dstates, dk_h, dv_h, shape, kind, scale)
    return dq, dk, dv


class LinearBranchFunction(torch.autograd.Function):
    """Forward and backward of the linear branch; masks and permutations carry no gradient."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.rest = rest
        return linear_forward(q, k, v, *rest)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        return (*linear_backward(grad, q, k, v, *ctx.rest), *([None] * len(ctx.rest)))


def linear_branch_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
    """See :func:`dit_accel.kernels.linear_branch.linear_branch`."""
    return LinearBranchFunction.apply(q, k, v, *rest)
