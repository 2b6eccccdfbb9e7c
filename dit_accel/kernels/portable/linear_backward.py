"""Triton backward of the linear branch, and its autograd function.

With a = phi(q) and den = a . Z + eps, per query block: ``dH = (a / den)^T dO``, ``dZ = -(a / den)^T D`` and
``dphi(q) = (dO H^T - D Z^T) / den`` where ``D = rowsum(dO * O) = rowsum(a * dO H^T) / den``. Per key block, with
G and g the sums of dH and dZ over the query blocks that count it as marginal (the transposed matrix product of
the forward): ``dphi(k) = V G^T + 1 g^T``, ``dV = phi(k) G``. States are recomputed, not saved, but for the one of
all tokens; nothing is atomic, so gradients are the same from run to run.

A projection W of the output is one of the values, ``W (H^T a) = (H W^T)^T a``, so no gradient of the unprojected
output is ever made. Over all tokens W acts on the state: with ``H' = H W^T`` above, ``dH = dH' W`` and
``dW = sum over heads of dH'^T H``, products of D x D matrices. Over blocks it acts on V: ``dV = dV' W`` and
``dW = sum over tokens of dV'^T V``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ..block_mask import BlockMask
from ..linear_branch import project_heads
from ..projection import sum_rows
from .linear import (
    SPLITS,
    Shape,
    all_states,
    combine,
    launch_block_states,
    linear_forward,
    map_scale,
    registers,
    scaled_map,
    shape_of,
)
from .linear_kernels import feature_map, program_index, slot_rows
from .pooling import lead_strides

STATE_SHARE = 0.5
"""Backward states may take this share of the bytes of q, k, v and out: fewer, fuller launches."""


DQ_TILE, DQ_STAGES = 32, 1
"""Query rows of one step of the dq kernel (64 spills registers), and its pipeline depth."""


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


def launch_dq(
    q: torch.Tensor,
    grad: torch.Tensor,
    rows: torch.Tensor | None,
    states: torch.Tensor,
    dq: torch.Tensor,
    dstates: torch.Tensor,
    shape: Shape,
    kind: str,
    eps: float,
    gain: float,
    *,
    group_tokens: int,
    batch0: int = 0,
    head0: int = 0,
) -> None:
    """Fill ``dq``, and ``dstates`` [heads of the launch, groups, D * D + D]."""
    groups = triton.cdiv(shape.q_len, group_tokens)
    with torch.cuda.device_of(q):
        linear_dq_bwd_kernel[(states.shape[0] * groups,)](
            q,
            grad,
            rows if rows is not None else q,
            states,
            dq,
            dstates,
            shape.q_len,
            min(shape.heads, states.shape[0]),
            groups,
            group_tokens,
            batch0,
            head0,
            eps,
            gain,
            *q.stride(),
            *grad.stride(),
            *dq.stride(),
            *lead_strides(rows),
            states.stride(0),
            0 if states.shape[1] == 1 else shape.state_width,
            HAS_ROWS=rows is not None,
            KIND=kind,
            TILE=min(shape.block_q, DQ_TILE),
            num_warps=8 if shape.dim > 64 else 4,
            num_stages=DQ_STAGES,
            **shape.constants,
        )


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
    *,
    batch0: int = 0,
    head0: int = 0,
) -> None:
    """Fill ``dk`` and ``dv`` from the summed state gradients [heads of the launch, blocks or 1, ...]."""
    tiles = triton.cdiv(shape.kv_len, shape.tile_k)
    with torch.cuda.device_of(k):
        linear_dkv_bwd_kernel[(dstates.shape[0] * tiles,)](
            k,
            v,
            rows if rows is not None else k,
            key_mask if key_mask is not None else k,
            dstates,
            dk,
            dv,
            shape.kv_len,
            min(shape.heads, dstates.shape[0]),
            tiles,
            batch0,
            head0,
            scale,
            *k.stride(),
            *v.stride(),
            *dk.stride(),
            *lead_strides(rows),
            shape.kv_len,
            dstates.stride(0),
            0 if dstates.shape[1] == 1 else shape.state_width,
            HAS_ROWS=rows is not None,
            HAS_MASK=key_mask is not None,
            KIND=kind,
            TILES_PER_BLOCK=shape.block_k // shape.tile_k,
            TILE=shape.tile_k,
            num_warps=8 if shape.dim > 64 else 4,
            maxnreg=registers(shape),
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
    *,
    weight: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    needs_keys: bool = True,
    needs_weight: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of q, k, v, contiguous, in their dtypes, and of ``weight``; None for those not needed.

    ``mean`` is the forward's, given in the form over all tokens.
    """
    rows = None if rows is None else rows.contiguous()
    k_rows = None if k_rows is None else k_rows.contiguous()
    key_mask = None if key_mask is None else key_mask.expand(k.shape[:2]).contiguous()
    weight = None if weight is None else weight.to(q.dtype).contiguous()
    grad = grad.to(q.dtype)
    if critical is None:
        return _all_tokens_backward(grad, q, k, v, kind, rows, key_mask, eps, weight, mean, needs_keys, needs_weight)
    values = v if weight is None else project_heads(v, weight)
    dq, dk, dv = _blocks_backward(
        grad, q, k, values, critical, negligible, kind, rows, k_rows, key_mask, eps, needs_keys or needs_weight
    )
    dweight = None
    if needs_weight:
        # Hidden values may be anything; their gradients are zeros.
        seen = v if key_mask is None else v.masked_fill(~key_mask[..., None, None], 0)
        if weight.dim() == 2:
            dweight = dv.flatten(0, 2).mT @ seen.flatten(0, 2)
        else:
            dweight = torch.einsum("bshe,bshd->hed", dv, seen)
    if not needs_keys:
        return dq, None, None, dweight
    return dq, dk, dv if weight is None else project_heads(dv, weight.mT), dweight


def _all_tokens_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kind: str,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    eps: float,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    needs_keys: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    shape = shape_of(q, k, None)
    total = shape.batch * shape.heads
    group = triton.cdiv(triton.cdiv(shape.q_len, max(1, SPLITS // total)), 64) * 64
    groups = triton.cdiv(shape.q_len, group)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    partial = torch.empty(total, groups, shape.state_width, dtype=torch.float32, device=q.device)
    states = combine(mean, weight, shape)
    launch_dq(q, grad, rows, states, dq, partial, shape, kind, eps / shape.kv_len, 1.0, group_tokens=group)
    dk = dv = dweight = None
    if needs_weight:
        partial = combine(partial, None, shape, dtype=torch.float32)
        dstate, state = (
            x[:, 0, : shape.dim**2].view(shape.batch, shape.heads, shape.dim, shape.dim) for x in (partial, mean)
        )
        dweight = torch.einsum("bhfe,bhfd->ed" if weight.dim() == 2 else "bhfe,bhfd->hed", dstate, state)
    if needs_keys:
        dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
        dstates = combine(partial, None if weight is None else weight.mT.contiguous(), shape)
        launch_dkv(k, v, None, key_mask, dstates, dk, dv, shape, kind, 1.0 / shape.kv_len)
    return dq, dk, dv, dweight


def _blocks_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    critical: BlockMask,
    negligible: BlockMask | None,
    kind: str,
    rows: torch.Tensor | None,
    k_rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    eps: float,
    needs_keys: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = shape_of(q, k, critical)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    nq, nk = critical.num_blocks
    scale = map_scale(nk)
    marginal = scaled_map(critical, negligible, q.dtype, scale).expand(shape.batch, shape.heads, nq, nk)
    states = None
    for batches, heads in shape.chunks(STATE_SHARE, 2):
        part = marginal[batches, heads].flatten(0, 1)
        if states is None or states.shape[0] != part.shape[0]:
            states, dstates = (q.new_empty(part.shape[0], nk, shape.state_width) for _ in range(2))
            sums, dsums = (q.new_empty(part.shape[0], nq, shape.state_width) for _ in range(2))
        b, head = batches.start, heads.start
        launch_block_states(k, v, k_rows, key_mask, None, states, shape, kind, b, head)
        torch.bmm(part, states, out=sums)
        # The gain keeps summed gradients within float16's range until the last kernel takes it out again.
        launch_dq(
            q, grad, rows, sums, dq, dsums, shape, kind, eps * scale, 1.0 / scale,
            group_tokens=shape.block_q, batch0=b, head0=head,
        )  # fmt: skip
        if needs_keys:
            torch.bmm(part.mT, dsums, out=dstates)
            launch_dkv(k, v, k_rows, key_mask, dstates, dk, dv, shape, kind, scale, batch0=b, head0=head)
    return dq, dk, dv


class LinearBranchFunction(torch.autograd.Function):
    """``added + linear_branch(...) @ weight.T + bias``, each of the three optional, and its backward.

    Masks and permutations carry no gradient. Kept are inputs and, in the form over all tokens, its one state a
    head, float32: D * D + D numbers, so that keys and values are read once less.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        added: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        *rest: Any,
    ) -> torch.Tensor:
        critical, _, kind, _, _, key_mask, _ = rest
        mean = None
        if critical is None:
            visible = None if key_mask is None else key_mask.expand(k.shape[:2]).contiguous()
            mean = all_states(k, v, visible, None, shape_of(q, k, None), kind, torch.float32)
        ctx.save_for_backward(q, k, v, weight, bias, mean)
        ctx.rest = rest
        return linear_forward(q, k, v, *rest, added=added, weight=weight, bias=bias, mean=mean)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, weight, bias, mean = ctx.saved_tensors
        needs_q, needs_k, needs_v, needs_added, needs_weight, needs_bias = ctx.needs_input_grad[:6]
        dq = dk = dv = dweight = dbias = None
        if needs_q or needs_k or needs_v or needs_weight:
            # Products in the dtypes that the kernels expect, also where a backward runs under autocast.
            with torch.autocast(grad.device.type, enabled=False):
                dq, dk, dv, dweight = linear_backward(
                    grad, q, k, v, *ctx.rest, weight=weight, mean=mean,
                    needs_keys=needs_k or needs_v, needs_weight=needs_weight,
                )  # fmt: skip
        if needs_weight:
            dweight = dweight.to(weight.dtype)
        if needs_bias:
            # Rows of one bias each: a head's, or a token's of all heads.
            rows = grad.flatten(0, 2) if bias.dim() == 1 else grad.flatten(0, 1).flatten(1)
            dbias = sum_rows(rows).view(bias.shape).to(bias.dtype)
        return dq, dk, dv, grad if needs_added else None, dweight, dbias, *([None] * len(ctx.rest))
