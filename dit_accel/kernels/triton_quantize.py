"""The quantising prologue: q, k and v read once, permuted, smoothed, quantised and averaged per block.

Two launches: sums of sampled tiles of k (and maxima of v for FP8) in chunks, then one program for every block of
q, of k and, where v is rewritten at all, of v. The second adds up the chunks by itself, so that nothing small runs
between the two.
"""

from __future__ import annotations

import itertools
import math

import torch
import triton
import triton.language as tl

from .quantize import FP8_MAX, KEY_GROUPS, KEY_TILE, QuantizedInputs, sampled_keys, validate_key_scales
from .triton_forward import SIZES, mask_strides, padded_head_dim, unit_stride

FP8_MAX_ = tl.constexpr(FP8_MAX)
_K_CHUNKS, _V_CHUNKS = 16, 32  # at most; each block adds them all up
_CHUNK_PROGRAMS = 264  # two on each of an H200's multiprocessors


@triton.jit(do_not_specialize=(*SIZES, "k_chunks", "v_chunks", "k_step"))
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
    k_chunks,
    v_chunks,
    k_step,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Per channel: sums of every ``k_step``-th tile of k (third program axis 0), absolute maxima of v (1)."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    column = (offs_d < HEAD_DIM)[None, :]
    chunk = tl.program_id(0)
    found = tl.zeros([TILE, BLOCK_D], tl.float32)
    if tl.program_id(2) == 0:
        if chunk >= k_chunks:
            return
        k_ptr += batch * stride_kb + head * stride_kh
        at = (tl.program_id(1).to(tl.int64) * k_chunks + chunk) * HEAD_DIM + offs_d
        for tile in range(chunk * k_step, tl.cdiv(kv_len, TILE), k_chunks * k_step):
            row = tile * TILE + tl.arange(0, TILE)
            k_at = k_ptr + row.to(tl.int64)[:, None] * stride_ks + offs_d[None, :]
            found += tl.load(k_at, mask=(row < kv_len)[:, None] & column, other=0.0).to(tl.float32)
        tl.store(k_sum_ptr + at, tl.sum(found, 0), mask=offs_d < HEAD_DIM)
    else:
        v_ptr += batch * stride_vb + head * stride_vh
        at = (tl.program_id(1).to(tl.int64) * v_chunks + chunk) * HEAD_DIM + offs_d
        for tile in range(chunk, tl.cdiv(kv_len, TILE), v_chunks):
            row = tile * TILE + tl.arange(0, TILE)
            v_at = v_ptr + row.to(tl.int64)[:, None] * stride_vs + offs_d[None, :]
            v = tl.load(v_at, mask=(row < kv_len)[:, None] & column, other=0.0).to(tl.float32)
            found = tl.maximum(found, tl.abs(v))
        tl.store(v_max_ptr + at, tl.max(found, 0), mask=offs_d < HEAD_DIM)


@triton.jit
def _chunk_values(ptr, plane, chunks, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr):
    """``[BLOCK_D, CHUNKS]`` of a plane, zeros past ``chunks``.

    Channels first: what is reduced from it then lies in threads as no row of a tile does, so that the compiler
    brings this vector to the layout of the tile and not, through shared memory, the tile to that of the vector.
    """
    offs_c, offs_d = tl.arange(0, CHUNKS), tl.arange(0, BLOCK_D)
    inside = (offs_d < HEAD_DIM)[:, None] & (offs_c < chunks)[None, :]
    return tl.load(ptr + (plane * chunks + offs_c[None, :]) * HEAD_DIM + offs_d[:, None], mask=inside, other=0.0)


@triton.jit
def _round_int8(x):
    # Adding 1.5 * 2**23 leaves no bits for a fraction: the nearest integer, halves to even, in the lowest byte.
    # A conversion would take the unit of which there are the fewest.
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _rows_at(ptr, rows_ptr, slot, length, batch, head, stride_b, stride_s, stride_h, PERMUTED: tl.constexpr):
    """Address of every slot's row; slots past ``length`` point at some row and must be masked."""
    row = slot
    if PERMUTED:
        row = tl.load(rows_ptr + slot, mask=slot < length, other=0)
    return ptr + batch * stride_b + head * stride_h + row.to(tl.int64)[:, None] * stride_s


@triton.jit
def _mean_key(ptr, plane, chunks, sampled, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr):
    return tl.sum(_chunk_values(ptr, plane, chunks, HEAD_DIM, BLOCK_D, CHUNKS), 1) / sampled


@triton.jit(do_not_specialize=(*SIZES, "q_blocks", "k_blocks", "k_chunks", "v_chunks", "sampled"))
def quantize_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    rows_ptr,
    k_sum_ptr,
    v_max_ptr,
    q_out_ptr,
    q_scale_ptr,
    q_mean_ptr,
    q_shift_ptr,
    k_out_ptr,
    k_scale_ptr,
    k_mean_ptr,
    v_out_ptr,
    v_scale_ptr,
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
    q_blocks,
    k_blocks,
    k_chunks,
    v_chunks,
    sampled,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    K_CHUNKS: tl.constexpr,
    V_CHUNKS: tl.constexpr,
    PERMUTED: tl.constexpr,
    SMOOTH_K: tl.constexpr,
    SMOOTH_Q: tl.constexpr,
    FP8: tl.constexpr,
    THREAD_SCALES: tl.constexpr,
):
    """One block: of q, then of k, then (FP8 or permuted) of v, along the first program axis; a head a plane."""
    place = tl.program_id(0)
    plane = tl.program_id(1).to(tl.int64)
    batch, head = plane // heads, plane % heads
    offs_d = tl.arange(0, BLOCK_D)
    column = offs_d < HEAD_DIM
    rows_ptr += batch * rows_batch_stride + head * rows_head_stride
    if place < q_blocks:
        q_slot = place * BLOCK_Q + tl.arange(0, BLOCK_Q)
        q_real = (q_slot < q_len)[:, None] & column[None, :]
        q_at = _rows_at(q_ptr, rows_ptr, q_slot, q_len, batch, head, stride_qb, stride_qs, stride_qh, PERMUTED)
        q = tl.load(q_at + offs_d[None, :], mask=q_real, other=0.0).to(tl.float32)
        q_to = plane * q_blocks * BLOCK_Q + q_slot
        q_shift = tl.zeros([BLOCK_Q], tl.float32)
        if SMOOTH_K:
            center = _mean_key(k_sum_ptr, plane, k_chunks, sampled, HEAD_DIM, BLOCK_D, K_CHUNKS)
            q_shift = tl.sum(q * center[None, :], 1)
        tl.store(q_shift_ptr + q_to, q_shift)
        q_mean = tl.sum(q, 0) / tl.minimum(q_len - place * BLOCK_Q, BLOCK_Q)
        tl.store(q_mean_ptr + (plane * q_blocks + place) * HEAD_DIM + offs_d, q_mean, mask=column)
        if SMOOTH_Q:
            q = tl.where(q_real, q - q_mean[None, :], 0.0)
        q_peak = tl.maximum(tl.max(tl.abs(q), 1), 1e-12)
        tl.store(q_scale_ptr + q_to, q_peak / 127)
        q_out = _round_int8(q * tl.div_rn(tl.full([BLOCK_Q], 127.0, tl.float32), q_peak)[:, None])
        tl.store(q_out_ptr + q_to[:, None] * HEAD_DIM + offs_d[None, :], q_out, mask=column[None, :])
    elif place < q_blocks + k_blocks:
        k_block = place - q_blocks
        k_slot = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
        k_real = (k_slot < kv_len)[:, None] & column[None, :]
        k_at = _rows_at(k_ptr, rows_ptr, k_slot, kv_len, batch, head, stride_kb, stride_ks, stride_kh, PERMUTED)
        k = tl.load(k_at + offs_d[None, :], mask=k_real, other=0.0).to(tl.float32)
        k_mean = tl.sum(k, 0) / tl.minimum(kv_len - k_block * BLOCK_K, BLOCK_K)
        tl.store(k_mean_ptr + (plane * k_blocks + k_block) * HEAD_DIM + offs_d, k_mean, mask=column)
        if SMOOTH_K:
            center = _mean_key(k_sum_ptr, plane, k_chunks, sampled, HEAD_DIM, BLOCK_D, K_CHUNKS)
            k = tl.where(k_real, k - center[None, :], 0.0)
        k_to = plane * k_blocks * BLOCK_K + k_slot
        # A NaN or infinite key makes the scales NaN: the maximum alone would pass over a NaN.
        broken = tl.sum(k_mean, 0) * 0.0
        key_peak = tl.max(tl.abs(k), 1)
        if THREAD_SCALES:
            # The four groups of keys that four neighbouring threads of the products hold.
            GROUPS: tl.constexpr = (BLOCK_K // 8, 4, 2)
            k_peak = tl.maximum(tl.max(tl.max(tl.reshape(key_peak, GROUPS), 2), 0), 1e-12) + broken
            tl.store(k_scale_ptr + (plane * k_blocks + k_block) * 4 + tl.arange(0, 4), k_peak / 127)
            k_inverse = tl.div_rn(tl.full([4], 127.0, tl.float32), k_peak)
            k_inverse = tl.reshape(tl.broadcast_to(k_inverse[None, :, None], GROUPS), (BLOCK_K,))
            k_out = _round_int8(k * k_inverse[:, None])
        else:
            k_peak = tl.maximum(tl.max(key_peak, 0), 1e-12) + broken
            tl.store(k_scale_ptr + plane * k_blocks + k_block, k_peak / 127)
            k_out = _round_int8(k * tl.div_rn(tl.full([], 127.0, tl.float32), k_peak))
        tl.store(k_out_ptr + k_to[:, None] * HEAD_DIM + offs_d[None, :], k_out, mask=column[None, :])
    else:
        v_block = place - q_blocks - k_blocks
        v_slot = v_block * BLOCK_K + tl.arange(0, BLOCK_K)
        if FP8:
            # Loaded in the inverse order of KEY_PLACE, so that what is stored lies side by side.
            v_slot = v_block * BLOCK_K + (tl.arange(0, BLOCK_K) // 16) * 16
            n = tl.arange(0, BLOCK_K) % 16
            v_slot += (n & 2) * 4 + (n & 8) // 2 + (n & 4) // 2 + (n & 1)
        v_real = (v_slot < kv_len)[:, None] & column[None, :]
        v_at = _rows_at(v_ptr, rows_ptr, v_slot, kv_len, batch, head, stride_vb, stride_vs, stride_vh, PERMUTED)
        v = tl.load(v_at + offs_d[None, :], mask=v_real, other=0.0)
        if FP8:
            v_peak = tl.max(_chunk_values(v_max_ptr, plane, v_chunks, HEAD_DIM, BLOCK_D, V_CHUNKS), 1)
            v_peak = tl.maximum(v_peak, 1e-12)
            most = tl.full([BLOCK_D], FP8_MAX_, tl.float32)
            v_scale = tl.div_rn(v_peak, most)
            tl.store(
                v_scale_ptr + plane * HEAD_DIM + offs_d, v_scale, mask=column & (offs_d + v_block * BLOCK_D < BLOCK_D)
            )
            stored = (v.to(tl.float32) * tl.div_rn(most, v_peak)[None, :]).to(tl.float8e4nv)
            key = v_block * BLOCK_K + tl.arange(0, BLOCK_K)
            v_out = v_out_ptr + (plane * HEAD_DIM + offs_d)[:, None] * (k_blocks * BLOCK_K) + key[None, :]
            tl.store(v_out, tl.trans(stored), mask=column[:, None])
        else:
            v_out = v_out_ptr + ((batch * kv_len + v_slot)[:, None] * heads + head) * HEAD_DIM + offs_d[None, :]
            tl.store(v_out, v, mask=v_real)


def _carve(batch: int, heads: int, shapes: list[tuple[int, ...]], device: torch.device) -> list[torch.Tensor]:
    """Contiguous float32 tensors ``[B, H, *shape]`` in one allocation, each aligned to 16 bytes."""
    sizes = [batch * heads * math.prod(shape) for shape in shapes]
    starts = [0, *itertools.accumulate(-(-size // 4) * 4 for size in sizes)]
    whole = torch.empty(starts[-1], dtype=torch.float32, device=device)
    pieces = []
    for shape, start in zip(shapes, starts, strict=False):
        full = (batch, heads, *shape)
        strides = [math.prod(full[n + 1 :]) for n in range(len(full))]
        pieces.append(whole.as_strided(full, strides, start))
    return pieces


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
    key_scales: str = "block",
) -> QuantizedInputs:
    """Quantise ``[B, S, H, D]`` inputs for :func:`quantized_block_sparse_attention`.

    One pass over some of k (and all of v for FP8) for the mean key and the value scales, then one over q, k and v;
    v is left where it is when it stays in its dtype and order.

    Args:
        block_q, block_k: block sizes of the mask, powers of two.
        precision: ``"int8"`` or ``"int8_fp8"``.
        rows: optional permutation ``[B or 1, H or 1, S]`` applied while writing.
        smooth_k: subtract the mean key.
        smooth_q: subtract the mean of each query block.
        key_scales: ``"block"`` or ``"thread"``, see :mod:`~dit_accel.kernels.quantize`.
    """
    validate_key_scales(key_scales, block_k)
    if precision not in ("int8", "int8_fp8"):
        raise ValueError(f"precision must be int8 or int8_fp8 for the kernels, got {precision!r}.")
    batch, q_len, heads, dim = q.shape
    kv_len = k.shape[1]
    device = q.device
    fp8 = precision == "int8_fp8"
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    nq, nk = -(-q_len // block_q), -(-kv_len // block_k)
    block_d = padded_head_dim(dim)
    planes = batch * heads

    def make(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty((batch, heads, *shape), dtype=dtype, device=device)

    k_step, sampled = sampled_keys(kv_len)
    tiles, wanted = triton.cdiv(kv_len, KEY_TILE), max(1, _CHUNK_PROGRAMS // planes)
    k_chunks = min(_K_CHUNKS, triton.cdiv(tiles, k_step), wanted)
    v_chunks = min(_V_CHUNKS, tiles, wanted) if fp8 else 0
    groups = (KEY_GROUPS,) if key_scales == "thread" else ()
    shapes = [(nq * block_q,), (nk, *groups), (nq, dim), (nk, dim), (nq * block_q,), (k_chunks, dim)]
    shapes += [(v_chunks, dim), (dim,)] if fp8 else []
    q_scale, k_scale, q_mean, k_mean, q_shift, k_sum, *of_v = _carve(batch, heads, shapes, device)
    v_max, v_scale = of_v if fp8 else (k_sum, None)
    if smooth_k or fp8:
        key_value_stats_kernel[(max(k_chunks, v_chunks), planes, 2 if fp8 else 1)](
            k,
            v,
            k_sum,
            v_max,
            *k.stride()[:3],
            *v.stride()[:3],
            heads,
            kv_len,
            k_chunks,
            v_chunks,
            k_step,
            TILE=KEY_TILE,
            BLOCK_D=block_d,
            HEAD_DIM=dim,
            num_warps=8,
        )
    value = v
    if fp8:
        value = make(dim, nk * block_k, dtype=torch.float8_e4m3fn)
    elif rows is not None:
        value = torch.empty((batch, kv_len, heads, dim), dtype=v.dtype, device=device)
    result = QuantizedInputs(
        q=make(nq * block_q, dim, dtype=torch.int8),
        q_scale=q_scale,
        k=make(nk * block_k, dim, dtype=torch.int8),
        k_scale=k_scale,
        v=value,
        v_scale=v_scale,
        q_mean=q_mean,
        k_mean=k_mean,
        q_shift=q_shift,
        smooth_q=smooth_q,
    )
    if rows is not None:
        rows = rows.to(torch.int32).contiguous()
    quantize_kernel[(nq + nk + (nk if fp8 or rows is not None else 0), planes)](
        q,
        k,
        v,
        k_sum if rows is None else rows,
        k_sum,
        v_max,
        result.q,
        result.q_scale,
        result.q_mean,
        result.q_shift,
        result.k,
        result.k_scale,
        result.k_mean,
        value,
        k_sum if v_scale is None else v_scale,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *((0, 0) if rows is None else mask_strides(rows, q_len)),
        heads,
        q_len,
        kv_len,
        nq,
        nk,
        k_chunks,
        v_chunks,
        sampled,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        BLOCK_D=block_d,
        HEAD_DIM=dim,
        K_CHUNKS=max(2, triton.next_power_of_2(k_chunks)),
        V_CHUNKS=max(2, triton.next_power_of_2(v_chunks)),
        PERMUTED=rows is not None,
        SMOOTH_K=smooth_k,
        SMOOTH_Q=smooth_q,
        FP8=fp8,
        THREAD_SCALES=key_scales == "thread",
        num_warps=8,
        maxnreg=128,  # two programs a multiprocessor: one loads while the other computes
    )
    return result
