"""The quantising prologue: q, k and v read once, permuted, smoothed, quantised and averaged per block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .quantize import FP8_MAX, PRECISIONS, QuantizedInputs
from .triton_forward import SIZES, mask_strides, padded_head_dim, unit_stride

FP8_MAX_ = tl.constexpr(FP8_MAX)
_CHUNK = 1024  # tokens summed by one program of the statistics pass


@triton.jit(do_not_specialize=SIZES)
def key_value_stats_kernel(
    k_ptr,
    v_ptr,
    k_sum_ptr,
    v_max_ptr,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    heads,
    kv_len,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WITH_V: tl.constexpr,
):
    """Sums of k and absolute maxima of v over a chunk of tokens, per channel."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh
    k_sum = tl.zeros([BLOCK_D], tl.float32)
    v_max = tl.zeros([BLOCK_D], tl.float32)
    for tile in range(CHUNK // TILE):
        row = tl.program_id(0) * CHUNK + tile * TILE + tl.arange(0, TILE)
        live = (row < kv_len)[:, None] & (offs_d < HEAD_DIM)[None, :]
        wide = row.to(tl.int64)[:, None]
        k = tl.load(k_ptr + wide * stride_ks + offs_d[None, :], mask=live, other=0.0).to(tl.float32)
        k_sum += tl.sum(k, 0)
        if WITH_V:
            v = tl.load(v_ptr + wide * stride_vs + offs_d[None, :], mask=live, other=0.0).to(tl.float32)
            v_max = tl.maximum(v_max, tl.max(tl.abs(v), 0))
    at = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * HEAD_DIM + offs_d
    tl.store(k_sum_ptr + at, k_sum, mask=offs_d < HEAD_DIM)
    if WITH_V:
        tl.store(v_max_ptr + at, v_max, mask=offs_d < HEAD_DIM)


@triton.jit
def _round_int8(x):
    return tl.floor(x + 0.5).to(tl.int8)


@triton.jit(do_not_specialize=(*SIZES, "q_padded", "kv_padded"))
def quantize_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    rows_ptr,
    center_ptr,
    v_scale_ptr,
    q_out_ptr,
    q_scale_ptr,
    q_mean_ptr,
    q_shift_ptr,
    k_out_ptr,
    k_scale_ptr,
    k_mean_ptr,
    v_out_ptr,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    rows_batch_stride,
    rows_head_stride,
    heads,
    q_len,
    kv_len,
    q_padded,
    kv_padded,
    TILE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PERMUTED: tl.constexpr,
    SMOOTH_Q: tl.constexpr,
    FP8: tl.constexpr,
):
    """Tokens ``[t * TILE, (t + 1) * TILE)`` of the permuted q, k and v of one head."""
    plane = tl.program_id(1).to(tl.int64)
    batch, head = plane // heads, plane % heads
    slot = tl.program_id(0) * TILE + tl.arange(0, TILE)
    offs_d = tl.arange(0, BLOCK_D)
    column = offs_d < HEAD_DIM
    rows_ptr += batch * rows_batch_stride + head * rows_head_stride
    row = slot
    if PERMUTED:
        row = tl.load(rows_ptr + slot, mask=slot < q_len, other=0)
    wide = row.to(tl.int64)[:, None]
    center = tl.load(center_ptr + plane * HEAD_DIM + offs_d, mask=column, other=0.0)

    real = (slot < q_len)[:, None] & column[None, :]
    fits = (slot < q_padded)[:, None] & column[None, :]
    q_at = q_ptr + batch * stride_qb + head * stride_qh + wide * stride_qs + offs_d[None, :]
    q = tl.load(q_at, mask=real, other=0.0).to(tl.float32)
    tl.store(q_shift_ptr + plane * q_padded + slot, tl.sum(q * center[None, :], 1), mask=slot < q_padded)
    for part in tl.static_range(TILE // BLOCK_Q):
        inside = (slot - tl.program_id(0) * TILE) // BLOCK_Q == part
        block = tl.program_id(0) * (TILE // BLOCK_Q) + part
        count = tl.maximum(tl.minimum(q_len - block * BLOCK_Q, BLOCK_Q), 1)
        mean = tl.sum(tl.where(inside[:, None], q, 0.0), 0) / count
        at = q_mean_ptr + (plane * (q_padded // BLOCK_Q) + block) * HEAD_DIM + offs_d
        tl.store(at, mean, mask=column & (block * BLOCK_Q + offs_d * 0 < q_padded))
        if SMOOTH_Q:
            q = tl.where(inside[:, None] & real, q - mean[None, :], q)
    q_scale = tl.maximum(tl.max(tl.abs(q), 1), 1e-12) / 127
    q_out = _round_int8(q / q_scale[:, None])
    tl.store(q_out_ptr + (plane * q_padded + slot)[:, None] * HEAD_DIM + offs_d[None, :], q_out, mask=fits)
    tl.store(q_scale_ptr + plane * q_padded + slot, q_scale, mask=slot < q_padded)

    real = (slot < kv_len)[:, None] & column[None, :]
    fits = (slot < kv_padded)[:, None] & column[None, :]
    k_at = k_ptr + batch * stride_kb + head * stride_kh + wide * stride_ks + offs_d[None, :]
    k = tl.load(k_at, mask=real, other=0.0).to(tl.float32)
    smooth = tl.where(real, k - center[None, :], 0.0)
    row_scale = tl.zeros([TILE], tl.float32)
    for part in tl.static_range(TILE // BLOCK_K):
        inside = (slot - tl.program_id(0) * TILE) // BLOCK_K == part
        block = tl.program_id(0) * (TILE // BLOCK_K) + part
        count = tl.maximum(tl.minimum(kv_len - block * BLOCK_K, BLOCK_K), 1)
        mean = tl.sum(tl.where(inside[:, None], k, 0.0), 0) / count
        at = k_mean_ptr + (plane * (kv_padded // BLOCK_K) + block) * HEAD_DIM + offs_d
        tl.store(at, mean, mask=column & (block * BLOCK_K + offs_d * 0 < kv_padded))
        k_scale = tl.maximum(tl.max(tl.max(tl.where(inside[:, None], tl.abs(smooth), 0.0), 1), 0), 1e-12) / 127
        tl.store(k_scale_ptr + plane * (kv_padded // BLOCK_K) + block, k_scale, mask=block * BLOCK_K < kv_padded)
        row_scale = tl.where(inside, k_scale, row_scale)
    k_out = _round_int8(smooth / row_scale[:, None])
    tl.store(k_out_ptr + (plane * kv_padded + slot)[:, None] * HEAD_DIM + offs_d[None, :], k_out, mask=fits)

    v_at = v_ptr + batch * stride_vb + head * stride_vh + wide * stride_vs + offs_d[None, :]
    if FP8:
        v = tl.load(v_at, mask=real, other=0.0).to(tl.float32)
        v_scale = tl.load(v_scale_ptr + plane * HEAD_DIM + offs_d, mask=column, other=1.0)
        # The order of KEY_PLACE, bit by bit.
        place = (slot // 16) * 16 + (slot & 4) * 2 + (slot & 2) * 2 + (slot & 8) // 4 + (slot & 1)
        v = (v / v_scale[None, :]).to(tl.float8e4nv)
        v_out = v_out_ptr + (plane * HEAD_DIM + offs_d)[None, :] * kv_padded + place[:, None]
        tl.store(v_out, v, mask=fits)
    else:
        v = tl.load(v_at, mask=real, other=0.0)
        tl.store(v_out_ptr + (plane * kv_padded + slot)[:, None] * HEAD_DIM + offs_d[None, :], v, mask=fits)


def quantize_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_q: int,
    block_k: int,
    *,
    precision: str = "int8",
    rows: torch.Tensor | None = None,
    smooth_k: bool = True,
    smooth_q: bool = False,
) -> QuantizedInputs:
    """Quantise ``[B, S, H, D]`` inputs for :func:`quantized_block_sparse_attention`.

    One pass over k (and v for FP8) for the mean key and the value scales, then one over q, k and v.

    Args:
        block_q, block_k: block sizes of the mask, powers of two.
        precision: one of :data:`~dit_accel.kernels.quantize.PRECISIONS`.
        rows: optional permutation ``[B or 1, H or 1, S]`` applied while writing.
        smooth_k: subtract the mean key.
        smooth_q: subtract the mean of each query block.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    batch, q_len, heads, dim = q.shape
    kv_len = k.shape[1]
    device = q.device
    fp8 = precision == "int8_fp8"
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    nq, nk = -(-q_len // block_q), -(-kv_len // block_k)
    q_padded, kv_padded = nq * block_q, nk * block_k
    block_d = padded_head_dim(dim)
    planes = (batch, heads)

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty((*planes, *shape), dtype=dtype, device=device)

    center, v_scale = torch.zeros((*planes, dim), dtype=torch.float32, device=device), None
    if smooth_k or fp8:
        chunks = triton.cdiv(kv_len, _CHUNK)
        k_sum, v_max = make(chunks, dim), make(chunks, dim)
        key_value_stats_kernel[(chunks, batch * heads)](
            k,
            v,
            k_sum,
            v_max,
            *k.stride()[:3],
            *v.stride()[:3],
            heads,
            kv_len,
            CHUNK=_CHUNK,
            TILE=64,
            BLOCK_D=block_d,
            HEAD_DIM=dim,
            WITH_V=fp8,
            num_warps=4,
        )
        if smooth_k:
            center = k_sum.sum(2) / kv_len
        if fp8:
            v_scale = v_max.amax(2).clamp_min(1e-12) / FP8_MAX
    value = make(dim, kv_padded, dtype=torch.float8_e4m3fn) if fp8 else make(kv_padded, dim, dtype=v.dtype)
    result = QuantizedInputs(
        q=make(q_padded, dim, dtype=torch.int8),
        q_scale=make(q_padded),
        k=make(kv_padded, dim, dtype=torch.int8),
        k_scale=make(nk),
        v=value,
        v_scale=v_scale,
        q_mean=make(nq, dim),
        k_mean=make(nk, dim),
        q_shift=make(q_padded),
        smooth_q=smooth_q,
    )
    if rows is not None:
        rows = rows.to(torch.int32).contiguous()
    tile = max(block_q, block_k)
    quantize_kernel[(triton.cdiv(max(q_len, kv_len), tile), batch * heads)](
        q,
        k,
        v,
        center if rows is None else rows,
        center,
        center if v_scale is None else v_scale,
        result.q,
        result.q_scale,
        result.q_mean,
        result.q_shift,
        result.k,
        result.k_scale,
        result.k_mean,
        value,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *((0, 0) if rows is None else mask_strides(rows, q_len)),
        heads,
        q_len,
        kv_len,
        q_padded,
        kv_padded,
        TILE=tile,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        BLOCK_D=block_d,
        HEAD_DIM=dim,
        PERMUTED=rows is not None,
        SMOOTH_Q=smooth_q,
        FP8=fp8,
        num_warps=8,
    )
    return result
