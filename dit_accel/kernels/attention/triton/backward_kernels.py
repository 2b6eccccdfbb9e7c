"""Device code of the backward of block-sparse attention in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from ...common.launch import LOG2_E, SIZES
from ...common.primitives import key_visibility

LOG2_E_ = tl.constexpr(LOG2_E)


@triton.jit(do_not_specialize=SIZES)
def delta_bwd_kernel(
    out_ptr,
    grad_ptr,
    grad_lse_ptr,
    delta_ptr,
    stride_ob,
    stride_os,
    stride_oh,
    stride_gb,
    stride_gs,
    stride_gh,
    heads,
    q_len,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """``delta = rowsum(dO * O) - dLSE``, float32 ``[B, H, Sq]``."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    live = (row < q_len)[:, None] & (offs_d < HEAD_DIM)[None, :]
    out_ptr += batch * stride_ob + head * stride_oh
    grad_ptr += batch * stride_gb + head * stride_gh
    wide = row.to(tl.int64)[:, None]
    out = tl.load(out_ptr + wide * stride_os + offs_d[None, :], mask=live, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + wide * stride_gs + offs_d[None, :], mask=live, other=0.0).to(tl.float32)
    at = (batch * heads + head) * q_len + row
    delta = tl.sum(out * grad, 1) - tl.load(grad_lse_ptr + at, mask=row < q_len, other=0.0)
    tl.store(delta_ptr + at, delta, mask=row < q_len)


@triton.jit(do_not_specialize=SIZES)
def block_sparse_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
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
    stride_gb,
    stride_gs,
    stride_gh,
    stride_db,
    stride_ds,
    stride_dh,
    mask_batch_stride,
    mask_head_stride,
    rows_batch_stride,
    rows_head_stride,
    heads,
    list_length,
    q_len,
    kv_len,
    scale,
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
    """dQ of ``TILE_Q`` queries of a block; each listed key block is walked in tiles of ``TILE_K`` keys.

    Inputs are in the mask's order; with PERMUTED the gradient goes to the original rows.
    """
    q_tiles: tl.constexpr = BLOCK_Q // TILE_Q
    query_block = tl.program_id(0) // q_tiles
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh
    grad_ptr += batch * stride_gb + head * stride_gh
    dq_ptr += batch * stride_db + head * stride_dh
    lse_ptr += (batch * heads + head) * q_len
    delta_ptr += (batch * heads + head) * q_len
    rows_ptr += batch * rows_batch_stride + head * rows_head_stride
    key_mask_ptr += batch * kv_len
    mask_row = batch * mask_batch_stride + head * mask_head_stride + query_block
    index_ptr += mask_row * list_length
    bit_rows_ptr += mask_row * list_length

    offs_m = (tl.program_id(0) % q_tiles) * TILE_Q + tl.arange(0, TILE_Q)
    offs_d = tl.arange(0, BLOCK_D)
    slot = query_block * BLOCK_Q + offs_m
    wide = slot.to(tl.int64)[:, None]
    live = (slot < q_len)[:, None] & (offs_d < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + wide * stride_qs + offs_d[None, :], mask=live, other=0.0)
    grad = tl.load(grad_ptr + wide * stride_gs + offs_d[None, :], mask=live, other=0.0)
    lse = tl.load(lse_ptr + slot, mask=slot < q_len, other=float("-inf"))
    delta = tl.load(delta_ptr + slot, mask=slot < q_len, other=0.0)
    # A row that saw nothing has weight 0 everywhere: exp2(x - inf).
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E_)

    acc = tl.zeros([TILE_Q, BLOCK_D], tl.float32)
    count = tl.load(counts_ptr + mask_row)
    full = tl.load(fulls_ptr + mask_row)
    tiles: tl.constexpr = BLOCK_K // TILE_K
    for phase in tl.static_range(2):
        for step in range((0 if phase == 0 else full) * tiles, (full if phase == 0 else count) * tiles):
            entry = step // tiles
            offs_n = (step % tiles) * TILE_K + tl.arange(0, TILE_K)
            key_slot = tl.load(index_ptr + entry) * BLOCK_K + offs_n
            inside = key_slot < kv_len
            k_rows = k_ptr + key_slot.to(tl.int64)[:, None] * stride_ks
            v_rows = v_ptr + key_slot.to(tl.int64)[:, None] * stride_vs
            if phase == 1 or HEAD_DIM != BLOCK_D:
                key_live = inside[:, None] & (offs_d < HEAD_DIM)[None, :]
                k = tl.load(k_rows + offs_d[None, :], mask=key_live, other=0.0)
                v = tl.load(v_rows + offs_d[None, :], mask=key_live, other=0.0)
            else:
                k = tl.load(k_rows + offs_d[None, :])
                v = tl.load(v_rows + offs_d[None, :])
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E_)
            weights = tl.math.exp2(scores - lse2[:, None])
            if phase == 1:
                bit_row = tl.full([], -1, tl.int32)
                if HAS_BITS:
                    bit_row = tl.load(bit_rows_ptr + entry)
                key_row = key_slot
                if PERMUTED and HAS_KEY_MASK:
                    key_row = tl.load(rows_ptr + key_slot, mask=inside, other=0)
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
                weights = tl.where(visible, weights, 0.0)
            grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            grad_scores = weights * (grad_weights - delta[:, None])
            acc = tl.dot(grad_scores.to(k.dtype), k, acc, input_precision=PRECISION)
    acc = acc * scale
    if PERMUTED:
        wide = tl.load(rows_ptr + slot, mask=slot < q_len, other=0).to(tl.int64)[:, None]
    tl.store(dq_ptr + wide * stride_ds + offs_d[None, :], acc.to(dq_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=SIZES)
def block_sparse_bwd_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
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
    stride_gb,
    stride_gs,
    stride_gh,
    stride_db,
    stride_ds,
    stride_dh,
    mask_batch_stride,
    mask_head_stride,
    rows_batch_stride,
    rows_head_stride,
    heads,
    list_length,
    q_len,
    kv_len,
    scale,
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
    """dK and dV of ``TILE_K`` keys of a block over the query blocks that read it, in tiles of ``TILE_Q`` queries.

    Inputs are in the mask's order; with PERMUTED the gradients go to the original rows.
    """
    k_tiles: tl.constexpr = BLOCK_K // TILE_K
    key_block = tl.program_id(0) // k_tiles
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh
    grad_ptr += batch * stride_gb + head * stride_gh
    dk_ptr += batch * stride_db + head * stride_dh
    dv_ptr += batch * stride_db + head * stride_dh
    lse_ptr += (batch * heads + head) * q_len
    delta_ptr += (batch * heads + head) * q_len
    rows_ptr += batch * rows_batch_stride + head * rows_head_stride
    key_mask_ptr += batch * kv_len
    mask_row = batch * mask_batch_stride + head * mask_head_stride + key_block
    index_ptr += mask_row * list_length
    bit_rows_ptr += mask_row * list_length

    offs_n = (tl.program_id(0) % k_tiles) * TILE_K + tl.arange(0, TILE_K)
    offs_d = tl.arange(0, BLOCK_D)
    key_slot = key_block * BLOCK_K + offs_n
    key_row = key_slot
    if PERMUTED:
        key_row = tl.load(rows_ptr + key_slot, mask=key_slot < kv_len, other=0)
    key_wide = key_slot.to(tl.int64)[:, None]
    key_live = (key_slot < kv_len)[:, None] & (offs_d < HEAD_DIM)[None, :]
    k = tl.load(k_ptr + key_wide * stride_ks + offs_d[None, :], mask=key_live, other=0.0)
    v = tl.load(v_ptr + key_wide * stride_vs + offs_d[None, :], mask=key_live, other=0.0)

    dk = tl.zeros([TILE_K, BLOCK_D], tl.float32)
    dv = tl.zeros([TILE_K, BLOCK_D], tl.float32)
    count = tl.load(counts_ptr + mask_row)
    full = tl.load(fulls_ptr + mask_row)
    tiles: tl.constexpr = BLOCK_Q // TILE_Q
    for phase in tl.static_range(2):
        for step in range((0 if phase == 0 else full) * tiles, (full if phase == 0 else count) * tiles):
            entry = step // tiles
            offs_m = (step % tiles) * TILE_Q + tl.arange(0, TILE_Q)
            slot = tl.load(index_ptr + entry) * BLOCK_Q + offs_m
            inside = slot < q_len
            wide = slot.to(tl.int64)[:, None]
            # The last query block may be short also where the key block is full.
            live = inside[:, None] & (offs_d < HEAD_DIM)[None, :]
            q = tl.load(q_ptr + wide * stride_qs + offs_d[None, :], mask=live, other=0.0)
            grad = tl.load(grad_ptr + wide * stride_gs + offs_d[None, :], mask=live, other=0.0)
            lse = tl.load(lse_ptr + slot, mask=inside, other=float("-inf"))
            delta = tl.load(delta_ptr + slot, mask=inside, other=0.0)
            lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E_)
            # Scores are kept transposed, [keys, queries], so that both sums below need no transposed copy.
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2_E_)
            weights = tl.math.exp2(scores - lse2[None, :])
            if phase == 1:
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
                weights = tl.where(tl.trans(visible), weights, 0.0)
            dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision=PRECISION)
            grad_weights = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
            grad_scores = weights * (grad_weights - delta[None, :])
            dk = tl.dot(grad_scores.to(q.dtype), q, dk, input_precision=PRECISION)
    dk = dk * scale
    offsets = key_row.to(tl.int64)[:, None] * stride_ds + offs_d[None, :]
    tl.store(dk_ptr + offsets, dk.to(dk_ptr.dtype.element_ty), mask=key_live)
    tl.store(dv_ptr + offsets, dv.to(dv_ptr.dtype.element_ty), mask=key_live)
