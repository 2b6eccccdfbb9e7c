"""Triton block-sparse attention forward (FlashAttention-2's online softmax over a list of key blocks)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...common.compiled import KeptKernel
from ...common.launch import (
    DOT_PRECISION,
    LOG2_E,
    SIZES,
    int32_rows,
    list_strides,
    mask_constants,
    mask_tensors,
    padded_head_dim,
    token_strides,
    unit_stride,
)
from ...common.primitives import LN_2_, key_visibility, online_softmax_update
from ...mask.block_mask import BlockMask
from ..launch_configs import LaunchConfig
from ..tuning import launch_config


@triton.jit
def _attend(
    acc,
    row_max,
    row_sum,
    q,
    k_ptr,
    v_ptr,
    rows_ptr,
    index_ptr,
    bit_rows_ptr,
    bits_ptr,
    key_mask_ptr,
    begin,
    end,
    kv_len,
    stride_ks,
    stride_vs,
    scale_log2,
    offs_m,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PARTIAL: tl.constexpr,
    PERMUTED: tl.constexpr,
    HAS_BITS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One pass of the online softmax over list entries ``begin`` to ``end``, in tiles of ``TILE_K`` keys."""
    offs_d = tl.arange(0, BLOCK_D)
    tiles: tl.constexpr = BLOCK_K // TILE_K
    for step in range(begin * tiles, end * tiles):
        entry = step // tiles
        offs_n = (step % tiles) * TILE_K + tl.arange(0, TILE_K)
        block = tl.load(index_ptr + entry)
        slot = block * BLOCK_K + offs_n
        row = slot
        if PERMUTED:
            if PARTIAL:
                row = tl.load(rows_ptr + slot, mask=slot < kv_len, other=0)
            else:
                row = tl.load(rows_ptr + slot)
        k_rows = k_ptr + row.to(tl.int64) * stride_ks
        v_rows = v_ptr + row.to(tl.int64) * stride_vs
        if PARTIAL or HEAD_DIM != BLOCK_D:
            live = (offs_d < HEAD_DIM)[None, :] & (slot < kv_len)[:, None]
            k = tl.load(k_rows[None, :] + offs_d[:, None], mask=tl.trans(live), other=0.0)
            v = tl.load(v_rows[:, None] + offs_d[None, :], mask=live, other=0.0)
        else:
            k = tl.load(k_rows[None, :] + offs_d[:, None])
            v = tl.load(v_rows[:, None] + offs_d[None, :])
        scores = tl.dot(q, k, input_precision=PRECISION)
        if PARTIAL:
            bit_row = tl.full([], -1, tl.int32)
            if HAS_BITS:
                bit_row = tl.load(bit_rows_ptr + entry)
            visible = key_visibility(
                bits_ptr,
                bit_row,
                key_mask_ptr,
                slot,
                row,
                kv_len,
                offs_m,
                offs_n,
                BLOCK_Q,
                BLOCK_K,
                HAS_BITS,
                HAS_KEY_MASK,
            )
            scores = tl.where(visible, scores * scale_log2, float("-inf"))
            p, row_max, row_sum, acc_scale = online_softmax_update(scores, row_max, row_sum, True)
        else:
            # Scaled where it is exponentiated: a multiplication and an addition in one instruction.
            new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
            p = tl.math.exp2(scores * scale_log2 - new_max[:, None])
            acc_scale = tl.math.exp2(row_max - new_max)
            row_sum = row_sum * acc_scale + tl.sum(p, 1)
            row_max = new_max
        acc = acc * acc_scale[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=SIZES)
def block_sparse_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    counts_ptr,
    fulls_ptr,
    index_ptr,
    bit_rows_ptr,
    bits_ptr,
    rows_ptr,
    key_mask_ptr,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_ob,
    stride_os,
    stride_oh,
    mask_batch_stride,
    mask_head_stride,
    rows_batch_stride,
    rows_head_stride,
    heads,
    list_length,
    q_len,
    kv_len,
    scale_log2,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PERMUTED: tl.constexpr,
    HAS_BITS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``TILE_Q`` queries of a block of one head. Mask strides count query-block rows, rows strides count tokens."""
    tiles: tl.constexpr = BLOCK_Q // TILE_Q
    query_block = tl.program_id(0) // tiles
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh
    out_ptr += batch * stride_ob + head * stride_oh
    lse_ptr += (batch * heads + head) * q_len
    rows_ptr += batch * rows_batch_stride + head * rows_head_stride
    key_mask_ptr += batch * kv_len
    mask_row = batch * mask_batch_stride + head * mask_head_stride + query_block
    index_ptr += mask_row * list_length
    bit_rows_ptr += mask_row * list_length

    offs_d = tl.arange(0, BLOCK_D)
    first = query_block * BLOCK_Q
    offs_m = (tl.program_id(0) % tiles) * TILE_Q + tl.arange(0, TILE_Q)
    slot = first + offs_m
    row = slot
    if PERMUTED:
        row = tl.load(rows_ptr + slot, mask=slot < q_len, other=0)
    live = (slot < q_len)[:, None] & (offs_d < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + row.to(tl.int64)[:, None] * stride_qs + offs_d[None, :], mask=live, other=0.0)

    acc = tl.zeros([TILE_Q, BLOCK_D], tl.float32)
    row_max = tl.full([TILE_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([TILE_Q], tl.float32)
    count = tl.load(counts_ptr + mask_row)
    full = tl.load(fulls_ptr + mask_row)
    for phase in tl.static_range(2):
        acc, row_max, row_sum = _attend(
            acc,
            row_max,
            row_sum,
            q,
            k_ptr,
            v_ptr,
            rows_ptr,
            index_ptr,
            bit_rows_ptr,
            bits_ptr,
            key_mask_ptr,
            0 if phase == 0 else full,
            full if phase == 0 else count,
            kv_len,
            stride_ks,
            stride_vs,
            scale_log2,
            offs_m,
            BLOCK_Q,
            BLOCK_K,
            TILE_K,
            BLOCK_D,
            HEAD_DIM,
            phase == 1,
            PERMUTED,
            HAS_BITS,
            HAS_KEY_MASK,
            PRECISION,
        )

    nothing = row_sum == 0.0
    out = acc / tl.where(nothing, 1.0, row_sum)[:, None]
    lse = tl.where(nothing, float("-inf"), (row_max + tl.math.log2(tl.where(nothing, 1.0, row_sum))) * LN_2_)
    out_rows = out_ptr + row.to(tl.int64)[:, None] * stride_os
    tl.store(out_rows + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask=live)
    tl.store(lse_ptr + row, lse, mask=slot < q_len)


_FORWARD = KeptKernel(block_sparse_fwd_kernel)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    scale: float,
    config: LaunchConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``out [B, Sq, H, D]`` and ``lse [B, H, Sq]`` (float32) of validated inputs."""
    batch, q_len, heads, dim = q.shape
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    out = torch.empty((batch, q_len, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=q.device)
    nq, _ = mask.num_blocks
    rows = int32_rows(rows)
    config = config or launch_config("forward", q, mask, rows is not None)
    tile_q, tile_k = config.tiles(mask)
    _FORWARD[(nq * (mask.block_q // tile_q), batch * heads)](
        q,
        k,
        v,
        out,
        lse,
        *mask_tensors(mask, rows, key_mask),
        *token_strides(q, k, v, out),
        *list_strides(mask.kv_indices, nq),
        *list_strides(rows, q_len),
        heads,
        mask.kv_indices.shape[-1],
        q_len,
        k.shape[1],
        scale * LOG2_E,
        TILE_Q=tile_q,
        TILE_K=tile_k,
        BLOCK_D=padded_head_dim(dim),
        HEAD_DIM=dim,
        PRECISION=DOT_PRECISION,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **mask_constants(mask, rows, key_mask),
    )
    return out, lse
