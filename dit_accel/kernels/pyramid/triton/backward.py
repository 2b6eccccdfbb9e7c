"""Gradients of pyramid attention: two kernels over the concatenated levels, pooling by torch's own autograd.

The rows of all levels lie one level after the other, in the mask's order: a block at a level is a slice, and
nothing is gathered. Every gradient tile is summed by one program in list order: the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...common.launch import DOT_PRECISION, LOG2_E, ceil_div, lead_strides, padded_head_dim, power_of_two
from ...common.tokens import gather_mask, gather_rows
from ..levels import LEVELS, pool_level
from .forward import TILE, fitting_tiles, level_lists, pyramid_attention_triton

_TILE_Q = 64


@triton.jit
def pyramid_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    count_ptr,
    lists_ptr,
    num_ptr,
    dq_ptr,
    q_len,
    heads,
    tiles,
    nq,
    nk,
    total_rows,
    start2,
    start4,
    start8,
    scale,
    stride_ib,
    stride_ih,
    stride_nb,
    stride_nh,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ of ``TILE_Q`` queries of one head; tensors are ``[B, H, rows, D]``, scale includes log2(e)."""
    pid = tl.program_id(0)
    t = pid % tiles
    plane = (pid // tiles).to(tl.int64)
    b, h = plane // heads, plane % heads
    i = t * TILE_Q // BLOCK_Q
    o_d = tl.arange(0, DIM_PAD)
    in_d = (o_d < DIM)[None, :]
    slot = t * TILE_Q + tl.arange(0, TILE_Q)
    at = plane * q_len + slot
    ok_q = (slot < q_len)[:, None] & in_d
    q = tl.load(q_ptr + at[:, None] * DIM + o_d[None, :], mask=ok_q, other=0.0)
    grad = tl.load(grad_ptr + at[:, None] * DIM + o_d[None, :], mask=ok_q, other=0.0)
    lse = tl.load(lse_ptr + at, mask=slot < q_len, other=float("inf"))
    delta = tl.load(delta_ptr + at, mask=slot < q_len, other=0.0)
    p_list = lists_ptr + b * stride_ib + h * stride_ih + i.to(tl.int64) * nk
    p_num = num_ptr + b * stride_nb + h * stride_nh + i * 4
    acc = tl.zeros([TILE_Q, DIM_PAD], tl.float32)
    begin = 0
    for step in tl.static_range(0, 4):
        listed = tl.load(p_num + step)
        start = 0
        end = start2
        if step == 1:
            start = start2
            end = start4
        if step == 2:
            start = start4
            end = start8
        if step == 3:
            start = start8
            end = total_rows
        for first in range(0, listed * (BLOCK_K >> step), TILE):
            o = first + tl.arange(0, TILE)
            ok = o < listed * (BLOCK_K >> step)
            block = tl.load(p_list + begin + o // (BLOCK_K >> step), mask=ok, other=0)
            run = start + block * (BLOCK_K >> step) + o % (BLOCK_K >> step)
            ok = ok & (run < end)
            row = plane * total_rows + run
            count = tl.load(count_ptr + row, mask=ok, other=0.0)
            ok = ok & (count > 0.0)
            k = tl.load(k_ptr + row[:, None] * DIM + o_d[None, :], mask=ok[:, None] & in_d, other=0.0)
            v = tl.load(v_ptr + row[:, None] * DIM + o_d[None, :], mask=ok[:, None] & in_d, other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            s += tl.log2(tl.maximum(count, 1.0))[None, :]
            p = tl.where(ok[None, :], tl.exp2(s - lse[:, None]), 0.0)
            dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - delta[:, None])
            acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
        begin += listed
    tl.store(dq_ptr + at[:, None] * DIM + o_d[None, :], acc * (scale / 1.4426950408889634), mask=ok_q)


@triton.jit
def pyramid_bwd_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    count_ptr,
    lists_ptr,
    num_ptr,
    dk_ptr,
    dv_ptr,
    q_len,
    heads,
    nq,
    nk,
    total_rows,
    start,
    end,
    scale,
    stride_ib,
    stride_ih,
    stride_nb,
    stride_nh,
    STEP: tl.constexpr,
    RUNS: tl.constexpr,
    RUNS_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE_Q: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK and dV of one key block at one level, ``RUNS`` rows, over the query blocks that read it there."""
    pid = tl.program_id(0)
    j = pid % nk
    plane = (pid // nk).to(tl.int64)
    b, h = plane // heads, plane % heads
    o_d = tl.arange(0, DIM_PAD)
    in_d = (o_d < DIM)[None, :]
    o = tl.arange(0, RUNS_PAD)
    run = start + j * RUNS + o
    inside = (o < RUNS) & (run < end)
    row = plane * total_rows + run
    count = tl.load(count_ptr + row, mask=inside, other=0.0)
    ok = inside & (count > 0.0)
    k = tl.load(k_ptr + row[:, None] * DIM + o_d[None, :], mask=ok[:, None] & in_d, other=0.0)
    v = tl.load(v_ptr + row[:, None] * DIM + o_d[None, :], mask=ok[:, None] & in_d, other=0.0)
    bias = tl.log2(tl.maximum(count, 1.0))
    p_list = lists_ptr + b * stride_ib + h * stride_ih + j.to(tl.int64) * nq
    p_num = num_ptr + b * stride_nb + h * stride_nh + j * 4
    begin = 0
    for step in tl.static_range(0, STEP):
        begin += tl.load(p_num + step)
    listed = tl.load(p_num + STEP)
    dk = tl.zeros([RUNS_PAD, DIM_PAD], tl.float32)
    dv = tl.zeros([RUNS_PAD, DIM_PAD], tl.float32)
    tiles: tl.constexpr = BLOCK_Q // TILE_Q
    for entry in range(0, listed * tiles):
        block = tl.load(p_list + begin + entry // tiles)
        slot = block * BLOCK_Q + (entry % tiles) * TILE_Q + tl.arange(0, TILE_Q)
        at = plane * q_len + slot
        ok_q = (slot < q_len)[:, None] & in_d
        q = tl.load(q_ptr + at[:, None] * DIM + o_d[None, :], mask=ok_q, other=0.0)
        grad = tl.load(grad_ptr + at[:, None] * DIM + o_d[None, :], mask=ok_q, other=0.0)
        lse = tl.load(lse_ptr + at, mask=slot < q_len, other=float("inf"))
        delta = tl.load(delta_ptr + at, mask=slot < q_len, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale + bias[:, None]
        p = tl.where(ok[:, None], tl.exp2(s - lse[None, :]), 0.0)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    to = row[:, None] * DIM + o_d[None, :]
    tl.store(dk_ptr + to, dk * (scale / 1.4426950408889634), mask=inside[:, None] & in_d)
    tl.store(dv_ptr + to, dv, mask=inside[:, None] & in_d)


def _all_levels(
    x: torch.Tensor, rows: torch.Tensor | None, visible: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the four levels, ``[B, H, rows, D]`` in x's dtype, differentiable, and their token counts."""
    slots = gather_rows(x, rows).float()
    pooled = [pool_level(slots, visible, level) for level in LEVELS]
    counts = torch.cat([count.expand(slots.shape[0], slots.shape[1], -1) for _, count in pooled], 2)
    return torch.cat([mean for mean, _ in pooled], 2).to(x.dtype), counts.float()


def _backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    counts: torch.Tensor,
    levels: torch.Tensor,
    kv_len: int,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients (float32) of contiguous slot-ordered q ``[B, H, Sq, D]`` and of the rows of all levels."""
    batch, heads, q_len, dim = q.shape
    total = k.shape[2]
    sizes = [-(-kv_len // level) for level in LEVELS]
    starts = [sum(sizes[:n]) for n in range(5)]
    # A row that read nothing has weight 0 everywhere: exp2(x - inf).
    lse2 = torch.where(lse == -torch.inf, torch.inf, lse * LOG2_E).contiguous()
    nq, nk = levels.shape[2:]
    tile_q, tile = fitting_tiles(q, min(block_q, _TILE_Q), TILE, 2)
    shared = {
        "DIM": dim,
        "DIM_PAD": padded_head_dim(dim),
        "PRECISION": DOT_PRECISION,
        "num_warps": 4,
        "num_stages": 2,
    }
    dq = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    dk, dv = (torch.empty(k.shape, dtype=torch.float32, device=q.device) for _ in range(2))
    with torch.cuda.device_of(q):
        lists, num = level_lists(levels)
        tiles = ceil_div(q_len, tile_q)
        pyramid_bwd_dq_kernel[(batch * heads * tiles,)](
            q,
            k,
            v,
            grad,
            lse2,
            delta,
            counts,
            lists,
            num,
            dq,
            q_len,
            heads,
            tiles,
            nq,
            nk,
            total,
            *starts[1:4],
            scale * LOG2_E,
            *lead_strides(lists),
            *lead_strides(num),
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            TILE_Q=tile_q,
            TILE=tile,
            **shared,
        )
        lists, num = level_lists(levels.transpose(-1, -2))
        for step, level in enumerate(LEVELS):
            runs = block_k // level
            runs_pad = max(16, power_of_two(runs))
            # A program has all keys of a block; queries alone may come in fewer rows.
            _, walked = fitting_tiles(q, runs_pad, min(block_q, _TILE_Q), 2, least_kept=runs_pad)
            pyramid_bwd_dkv_kernel[(batch * heads * nk,)](
                q,
                k,
                v,
                grad,
                lse2,
                delta,
                counts,
                lists,
                num,
                dk,
                dv,
                q_len,
                heads,
                nq,
                nk,
                total,
                starts[step],
                starts[step + 1],
                scale * LOG2_E,
                *lead_strides(lists),
                *lead_strides(num),
                STEP=step,
                RUNS=runs,
                RUNS_PAD=runs_pad,
                BLOCK_Q=block_q,
                TILE_Q=walked,
                **shared,
            )
    return dq, dk, dv


class PyramidAttention(torch.autograd.Function):
    """The Triton forward with the gradients above; arguments as :func:`pyramid_attention_triton`'s."""

    @staticmethod
    def forward(ctx, q, k, v, levels, block_q, block_k, rows, key_mask, scale):
        out, lse = pyramid_attention_triton(q, k, v, levels, block_q, block_k, rows, key_mask, scale)
        ctx.save_for_backward(q, k, v, levels, rows, key_mask, out, lse)
        ctx.constants = (block_q, block_k, scale)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, grad, grad_lse):
        q, k, v, levels, rows, key_mask, out, lse = ctx.saved_tensors
        if grad is None and grad_lse is None:
            return (None,) * 9
        grad = torch.zeros_like(out) if grad is None else grad
        delta = (out.float() * grad.float()).sum(-1).transpose(1, 2)
        if grad_lse is not None:
            delta = delta - grad_lse
        visible = None if key_mask is None else gather_mask(key_mask, rows)
        k, v = k.detach().requires_grad_(), v.detach().requires_grad_()
        with torch.enable_grad():
            k_all, counts = _all_levels(k, rows, visible)
            v_all, _ = _all_levels(v, rows, visible)
        in_slots = gather_rows(torch.cat([q, grad], -1), rows).split(q.shape[-1], -1)
        scalars = torch.stack([lse, delta], -1)
        if rows is not None:
            scalars = scalars.gather(2, rows.long()[..., None].expand_as(scalars))
        dq, dk_all, dv_all = _backward(
            in_slots[0].contiguous(),
            k_all.detach(),
            v_all.detach(),
            in_slots[1].contiguous(),
            scalars[..., 0],
            scalars[..., 1].contiguous(),
            counts,
            levels,
            k.shape[1],
            *ctx.constants,
        )
        if rows is not None:
            dq = torch.empty_like(dq).scatter_(2, rows.long()[..., None].expand_as(dq), dq)
        grads = (dk_all.to(k_all.dtype), dv_all.to(v_all.dtype))
        dk, dv = torch.autograd.grad((k_all, v_all), (k, v), grads)
        return dq.transpose(1, 2).to(q.dtype), dk, dv, *(None,) * 6
