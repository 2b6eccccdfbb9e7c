"""Quantised block-sparse attention forward in plain Triton: any GPU, head dim and block shape."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...attention.launch_configs import LaunchConfig, quantized_launch
from ...attention.tuning import matrix_unit
from ...common.compiled import KeptKernel
from ...common.launch import (
    LOG2_E,
    SIZES,
    int32_rows,
    list_strides,
    mask_constants,
    mask_tensors,
    padded_head_dim,
    token_strides,
)
from ...common.primitives import LN_2_, key_visibility, online_softmax_update
from ...common.quantized_inputs import QuantizedInputs
from ...mask.block_mask import BlockMask


@triton.jit(do_not_specialize=(*SIZES, "q_padded", "kv_padded"))
def quantized_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_scale_ptr,
    k_scale_ptr,
    v_scale_ptr,
    q_mean_ptr,
    q_shift_ptr,
    out_ptr,
    lse_ptr,
    counts_ptr,
    fulls_ptr,
    index_ptr,
    bit_rows_ptr,
    bits_ptr,
    rows_ptr,
    key_mask_ptr,
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
    q_padded,
    kv_padded,
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
    SMOOTH_Q: tl.constexpr,
    FP8: tl.constexpr,
    THREAD_SCALES: tl.constexpr,
    HALF_TYPE: tl.constexpr,
    HALF_SUMS: tl.constexpr,
):
    """``TILE_Q`` queries of a block of one head of a QuantizedInputs, against ``TILE_K`` keys at a time.

    Output and LSE go to the original rows. ``HALF_SUMS``: weights and values of a tile are summed in float16, where
    GeForce cards are twice as fast, and tiles in float32. A weight is divided by ``TILE_K`` first, so that no sum of a
    tile exceeds its largest value. Each of ``TILE_K / 16`` additions rounds by 2**-11 of the sum of magnitudes.
    """
    q_tiles: tl.constexpr = BLOCK_Q // TILE_Q
    k_tiles: tl.constexpr = BLOCK_K // TILE_K
    query_block = tl.program_id(0) // q_tiles
    plane = tl.program_id(1).to(tl.int64)
    batch, head = plane // heads, plane % heads
    rows_ptr += batch * rows_batch_stride + head * rows_head_stride
    key_mask_ptr += batch * kv_len
    mask_row = batch * mask_batch_stride + head * mask_head_stride + query_block
    index_ptr += mask_row * list_length
    bit_rows_ptr += mask_row * list_length

    offs_m = (tl.program_id(0) % q_tiles) * TILE_Q + tl.arange(0, TILE_Q)
    offs_d = tl.arange(0, BLOCK_D)
    column = offs_d < HEAD_DIM
    slot = query_block * BLOCK_Q + offs_m
    at = plane * q_padded + slot
    q = tl.load(q_ptr + at[:, None] * HEAD_DIM + offs_d[None, :], mask=column[None, :], other=0)
    row_scale = tl.load(q_scale_ptr + at) * scale_log2
    if SMOOTH_Q:
        q_mean_ptr += (plane * (q_padded // BLOCK_Q) + query_block) * HEAD_DIM
        q_mean = tl.load(q_mean_ptr + offs_d, mask=column, other=0.0) * scale_log2

    acc = tl.zeros([TILE_Q, BLOCK_D], tl.float32)
    row_max = tl.full([TILE_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([TILE_Q], tl.float32)
    count = tl.load(counts_ptr + mask_row)
    full = tl.load(fulls_ptr + mask_row)
    for step in range(0, count * k_tiles):
        entry = step // k_tiles
        offs_n = (step % k_tiles) * TILE_K + tl.arange(0, TILE_K)
        block = tl.load(index_ptr + entry)
        key_slot = block * BLOCK_K + offs_n
        key_at = plane * kv_padded + key_slot
        k = tl.load(k_ptr + key_at[None, :] * HEAD_DIM + offs_d[:, None], mask=column[:, None], other=0)
        scale_at = plane * (kv_padded // BLOCK_K) + block
        if THREAD_SCALES:
            key_scale = tl.load(k_scale_ptr + scale_at * 4 + offs_n % 8 // 2)
            scores = tl.dot(q, k).to(tl.float32) * row_scale[:, None] * key_scale[None, :]
        else:
            key_scale = tl.load(k_scale_ptr + scale_at)
            scores = tl.dot(q, k).to(tl.float32) * (row_scale * key_scale)[:, None]
        if SMOOTH_Q:
            # What smoothing took from the logits of this block, common to all its rows.
            scores += (tl.sum(q_mean[:, None] * k.to(tl.float32), 0) * key_scale)[None, :]
        if entry >= full:
            key_row = key_slot
            if PERMUTED:
                key_row = tl.load(rows_ptr + key_slot, mask=key_slot < kv_len, other=0)
            bit_row = tl.full([], -1, tl.int32)
            if HAS_BITS:
                bit_row = tl.load(bit_rows_ptr + entry)
            visible = key_visibility(
                bits_ptr,
                bit_row,
                key_mask_ptr,
                key_slot,
                key_row,
                kv_len,
                offs_m,
                offs_n,
                BLOCK_Q,
                BLOCK_K,
                HAS_BITS,
                HAS_KEY_MASK,
            )
            scores = tl.where(visible, scores, float("-inf"))
        p, row_max, row_sum, acc_scale = online_softmax_update(scores, row_max, row_sum, True)
        acc = acc * acc_scale[:, None]
        if FP8:
            # The stored order of keys is KEY_PLACE.
            place = (key_slot // 16) * 16 + (key_slot & 4) * 2 + (key_slot & 2) * 2
            place += (key_slot & 8) // 4 + (key_slot & 1)
            v_at = v_ptr + (plane * HEAD_DIM + offs_d)[None, :] * kv_padded + place[:, None]
            v = tl.load(v_at, mask=column[None, :], other=0.0)
            acc += tl.dot((p * 448.0).to(tl.float8e4nv), v)
        else:
            v_at = v_ptr + batch * stride_vb + head * stride_vh + key_slot.to(tl.int64)[:, None] * stride_vs
            live = (key_slot < kv_len)[:, None] & column[None, :]
            v = tl.load(v_at + offs_d[None, :], mask=live, other=0.0)
            if HALF_SUMS:
                acc += tl.dot((p * (1.0 / TILE_K)).to(tl.float16), v, out_dtype=tl.float16).to(tl.float32)
            else:
                acc = tl.dot(p.to(HALF_TYPE), v, acc)

    nothing = row_sum == 0.0
    safe = tl.where(nothing, 1.0, row_sum)
    acc = acc / safe[:, None]
    if HALF_SUMS:
        acc = acc * TILE_K
    if FP8:
        v_scale = tl.load(v_scale_ptr + plane * HEAD_DIM + offs_d, mask=column, other=0.0)
        acc = acc * (v_scale / 448.0)[None, :]
    # Smoothing k took scale * q . mean(k) from every logit of the row.
    lse = (row_max + tl.math.log2(safe) + tl.load(q_shift_ptr + at) * scale_log2) * LN_2_
    lse = tl.where(nothing, float("-inf"), lse)
    live = slot < q_len
    row = slot
    if PERMUTED:
        row = tl.load(rows_ptr + slot, mask=live, other=0)
    out_at = out_ptr + batch * stride_ob + head * stride_oh + row.to(tl.int64)[:, None] * stride_os
    tl.store(out_at + offs_d[None, :], acc.to(out_ptr.dtype.element_ty), mask=live[:, None] & column[None, :])
    tl.store(lse_ptr + plane * q_len + row, lse, mask=live)


_TRITON_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


_FORWARD = KeptKernel(quantized_fwd_kernel)


def quantized_forward(
    quantized: QuantizedInputs,
    mask: BlockMask,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    scale: float,
    heads: int,
    dtype: torch.dtype,
    config: LaunchConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``out [B, Sq, H, D]`` in ``dtype`` and ``lse [B, H, Sq]``.

    Values are multiplied in their own dtype, and summed in float16 where ``quantized.half_sums``.
    """
    batch, _, q_padded, dim = quantized.q.shape
    kv_padded = quantized.k.shape[2]
    device = quantized.q.device
    out = torch.empty((batch, mask.q_len, heads, dim), dtype=dtype, device=device)
    lse = torch.empty((batch, heads, mask.q_len), dtype=torch.float32, device=device)
    nq, _ = mask.num_blocks
    rows = int32_rows(rows)
    block_d = max(32, padded_head_dim(dim))  # 8-bit products take at least 32 columns at once
    unit = matrix_unit(device.index or 0)[0] if quantized.q.is_cuda else "warpgroup"
    config = config or quantized_launch(mask.block_q, mask.block_k, block_d, unit)
    tile_q, tile_k = config.tiles(mask)
    _FORWARD[(nq * (mask.block_q // tile_q), batch * heads)](
        quantized.q,
        quantized.k,
        quantized.v,
        quantized.q_scale,
        quantized.k_scale,
        lse if quantized.v_scale is None else quantized.v_scale,
        quantized.q_mean,
        quantized.q_shift,
        out,
        lse,
        *mask_tensors(mask, rows, key_mask),
        *token_strides(quantized.v, out),
        *list_strides(mask.kv_indices, nq),
        *list_strides(rows, mask.q_len),
        heads,
        mask.kv_indices.shape[-1],
        mask.q_len,
        mask.kv_len,
        q_padded,
        kv_padded,
        scale * LOG2_E,
        TILE_Q=tile_q,
        TILE_K=tile_k,
        BLOCK_D=block_d,
        HEAD_DIM=dim,
        SMOOTH_Q=quantized.smooth_q,
        FP8=quantized.v_scale is not None,
        THREAD_SCALES=quantized.scales_by_thread,
        HALF_TYPE=_TRITON_TYPES[dtype],
        HALF_SUMS=quantized.half_sums,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **mask_constants(mask, rows, key_mask),
    )
    return out, lse
