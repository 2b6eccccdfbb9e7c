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
from torch.autograd.function import once_differentiable

from ...common.launch import ceil_div, lead_strides, or_stand_in
from ...mask.block_mask import BlockMask
from ..projection import project_heads, sum_rows
from ..shared import SharedSums
from .backward_kernels import linear_dkv_bwd_kernel, linear_dq_bwd_kernel
from .forward import (
    SPLITS,
    Shape,
    all_states,
    chunks_of,
    combine,
    contiguous_lists,
    launch_block_states,
    linear_forward,
    map_scale,
    registers,
    scaled_map,
    shape_of,
)

STATE_SHARE = 0.5
"""Backward states may take this share of the bytes of q, k, v and out: fewer, fuller launches."""


DQ_TILE, DQ_STAGES = 32, 1
"""Query rows of one step of the dq kernel (64 spills registers), and its pipeline depth."""


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
    groups = ceil_div(shape.q_len, group_tokens)
    with torch.cuda.device_of(q):
        linear_dq_bwd_kernel[(states.shape[0] * groups,)](
            q,
            grad,
            or_stand_in(rows, q),
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
    tiles = ceil_div(shape.kv_len, shape.tile_k)
    with torch.cuda.device_of(k):
        linear_dkv_bwd_kernel[(dstates.shape[0] * tiles,)](
            k,
            v,
            or_stand_in(rows, k),
            or_stand_in(key_mask, k),
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
    key_mask: torch.Tensor | None,
    eps: float,
    *,
    weight: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    needs_keys: bool = True,
    needs_weight: bool = False,
    shared: SharedSums | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of q, k, v, contiguous, in their dtypes, and of ``weight``; None for those not needed.

    ``mean`` is the forward's, given in the form over all tokens; permutations and key mask are contiguous.
    """
    weight = None if weight is None else weight.to(q.dtype).contiguous()
    grad = grad.to(q.dtype)
    if critical is None:
        return _all_tokens_backward(
            grad, q, k, v, kind, rows, key_mask, eps, weight, mean, needs_keys, needs_weight, shared
        )
    values = v if weight is None else project_heads(v, weight)
    dq, dk, dv = _blocks_backward(
        grad, q, k, values, critical, negligible, kind, rows, key_mask, eps, needs_keys or needs_weight, shared
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
    shared: SharedSums | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    shape = shape_of(q, k, None)
    total = shape.batch * shape.heads
    group = ceil_div(ceil_div(shape.q_len, max(1, SPLITS // total)), 64) * 64
    groups = ceil_div(shape.q_len, group)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    partial = torch.empty(total, groups, shape.state_width, dtype=torch.float32, device=q.device)
    states = combine(mean, weight, shape)
    tokens = shape.kv_len if shared is None else shared.tokens
    launch_dq(q, grad, rows, states, dq, partial, shape, kind, eps / tokens, 1.0, group_tokens=group)
    dk = dv = dweight = None
    if needs_weight:
        partial = combine(partial, None, shape, dtype=torch.float32)
        dstate, state = (
            x[:, 0, : shape.dim**2].view(shape.batch, shape.heads, shape.dim, shape.dim) for x in (partial, mean)
        )
        dweight = torch.einsum("bhfe,bhfd->ed" if weight.dim() == 2 else "bhfe,bhfd->hed", dstate, state)
    if needs_keys:
        dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
        if shared is not None:
            partial = shared.spread(combine(partial, None, shape, dtype=torch.float32))
        dstates = combine(partial, None if weight is None else weight.mT.contiguous(), shape)
        launch_dkv(k, v, None, key_mask, dstates, dk, dv, shape, kind, 1.0 / tokens)
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
    key_mask: torch.Tensor | None,
    eps: float,
    needs_keys: bool,
    shared: SharedSums | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = shape_of(q, k, critical)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    nq, nk = critical.num_blocks
    scale = map_scale(shape, shared)
    marginal = scaled_map(critical, negligible, q.dtype, scale).expand(shape.batch, shape.heads, nq, nk)
    states = None
    for batches, heads in chunks_of(shape, STATE_SHARE, 2, shared):
        part = marginal[batches, heads].flatten(0, 1)
        if states is None or states.shape[0] != part.shape[0]:
            states, dstates = (q.new_empty(part.shape[0], nk, shape.state_width) for _ in range(2))
            sums = q.new_empty(part.shape[0], nq, shape.state_width)
            dsums = q.new_empty(part.shape[0], ceil_div(shape.q_len, shape.block_q), shape.state_width)
        b, head = batches.start, heads.start
        launch_block_states(k, v, rows, key_mask, None, states, shape, kind, b, head)
        torch.bmm(part, states, out=sums)
        # The gain keeps summed gradients within float16's range until the last kernel takes it out again.
        total = sums if shared is None else shared.summed(sums)
        launch_dq(
            q, grad, rows, total, dq, dsums, shape, kind, eps * scale, 1.0 / scale,
            group_tokens=shape.block_q, batch0=b, head0=head,
        )  # fmt: skip
        if needs_keys:
            torch.bmm(part.mT, dsums if shared is None else shared.spread(dsums), out=dstates)
            launch_dkv(k, v, rows, key_mask, dstates, dk, dv, shape, kind, scale, batch0=b, head0=head)
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
        critical: BlockMask | None,
        negligible: BlockMask | None,
        kind: str,
        rows: torch.Tensor | None,
        key_mask: torch.Tensor | None,
        eps: float,
        shared: SharedSums | None,
    ) -> torch.Tensor:
        rows, key_mask = contiguous_lists(k, rows, key_mask)
        rest = (critical, negligible, kind, rows, key_mask, eps)
        mean = None
        if critical is None:
            mean = all_states(k, v, key_mask, None, shape_of(q, k, None), kind, torch.float32, shared)
        ctx.save_for_backward(q, k, v, weight, bias, mean)
        ctx.rest, ctx.shared = rest, shared
        return linear_forward(q, k, v, *rest, added=added, weight=weight, bias=bias, mean=mean, shared=shared)

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
                    needs_keys=needs_k or needs_v, needs_weight=needs_weight, shared=ctx.shared,
                )  # fmt: skip
        if needs_weight:
            dweight = dweight.to(weight.dtype)
        if needs_bias:
            # Rows of one bias each: a head's, or a token's of all heads.
            rows = grad.flatten(0, 2) if bias.dim() == 1 else grad.flatten(0, 1).flatten(1)
            dbias = sum_rows(rows).view(bias.shape).to(bias.dtype)
        return dq, dk, dv, grad if needs_added else None, dweight, dbias, *([None] * (len(ctx.rest) + 1))
