"""Kernels of the quantising prologue: sums and maxima, then the blocks of q, k and v.

What they do for an element is little, so that their time is that of memory: some 36 KB must be on their way to each
multiprocessor of an H200 at any time. A program therefore goes through many blocks, of one kind and one head, and
loads some ahead of the one it works on. Programs of neighbouring blocks and heads run side by side and read whole
pages of memory between them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...common.launch import SIZES
from ...common.quantized_inputs import FP8_MAX

FP8_MAX_ = tl.constexpr(FP8_MAX)
# Elements of 8 bits that a thread stores at once. With the 16 that it could store, the compiler would let it load 16
# neighbours of 16 bits as well: two accesses to halves of the same sectors.
STORED = tl.constexpr(8)


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
    STAGES: tl.constexpr,
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
        for tile in tl.range(chunk * k_step, tl.cdiv(kv_len, TILE), k_chunks * k_step, num_stages=STAGES):
            row = tile * TILE + tl.arange(0, TILE)
            k_at = k_ptr + row.to(tl.int64)[:, None] * stride_ks + offs_d[None, :]
            found += tl.load(k_at, mask=(row < kv_len)[:, None] & column, other=0.0).to(tl.float32)
        tl.store(k_sum_ptr + at, tl.sum(found, 0), mask=offs_d < HEAD_DIM)
    else:
        v_ptr += batch * stride_vb + head * stride_vh
        at = (tl.program_id(1).to(tl.int64) * v_chunks + chunk) * HEAD_DIM + offs_d
        for tile in tl.range(chunk, tl.cdiv(kv_len, TILE), v_chunks, num_stages=STAGES):
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
def _load_block(
    ptr,
    rows_ptr,
    block,
    place,
    length,
    stride_s,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PERMUTED: tl.constexpr,
):
    """``[BLOCK, BLOCK_D]``: the rows of a plane at ``place`` in a block of the (permuted) sequence, else zeros."""
    offs_d = tl.arange(0, BLOCK_D)
    slot = block * place.shape[0] + place
    row = slot
    if PERMUTED:
        row = tl.load(rows_ptr + slot, mask=slot < length, other=0)
    real = (slot < length)[:, None] & (offs_d < HEAD_DIM)[None, :]
    return tl.load(ptr + row.to(tl.int64)[:, None] * stride_s + offs_d[None, :], mask=real, other=0.0)


@triton.jit
def _mean_key(ptr, plane, chunks, sampled, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr):
    return tl.sum(_chunk_values(ptr, plane, chunks, HEAD_DIM, BLOCK_D, CHUNKS), 1) / sampled


@triton.jit
def _turned(x, DIM: tl.constexpr):
    """Rows ``[N, DIM]`` in a dtype that is multiplied, times the matrix of
    :func:`~dit_accel.kernels.common.quantized_inputs.rotation`; float32."""
    row, column = tl.arange(0, DIM), tl.arange(0, DIM)
    shared = row[:, None] & column[None, :]
    for step in tl.static_range(3):
        shared = shared ^ (shared >> (4 >> step))  # the parity of eight bits
    sign = (1 - 2 * (shared & 1)).to(x.dtype)  # exact in any dtype
    return tl.dot(x, sign, input_precision="ieee") * tl.rsqrt(tl.full([], DIM, tl.float32))


@triton.jit
def _turned_vector(x, DIM: tl.constexpr):
    """The same of one float32 vector, exactly."""
    row, column = tl.arange(0, DIM), tl.arange(0, DIM)
    shared = row[:, None] & column[None, :]
    for step in tl.static_range(3):
        shared = shared ^ (shared >> (4 >> step))  # the parity of eight bits
    turned = tl.sum(tl.where((shared & 1) == 0, x[:, None], -x[:, None]), 0)
    return turned * tl.rsqrt(tl.full([], DIM, tl.float32))


@triton.jit
def _quantize_queries(
    q_ptr,
    rows_ptr,
    k_sum_ptr,
    out_ptr,
    scale_ptr,
    mean_ptr,
    shift_ptr,
    plane,
    stride_s,
    length,
    blocks,
    chunks,
    sampled,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNKS: tl.constexpr,
    PERMUTED: tl.constexpr,
    SMOOTH_K: tl.constexpr,
    SMOOTH_Q: tl.constexpr,
    ROTATE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """This program's blocks of a plane of q: integers, a scale and a shift for every token, block means."""
    n, offs_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    column = offs_d < HEAD_DIM
    out_at = n[:, None] * HEAD_DIM + tl.max_contiguous(offs_d, STORED)[None, :]
    if SMOOTH_K:
        center = _mean_key(k_sum_ptr, plane, chunks, sampled, HEAD_DIM, BLOCK_D, CHUNKS)
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=STAGES):
        loaded = _load_block(q_ptr, rows_ptr, block, n, length, stride_s, HEAD_DIM, BLOCK_D, PERMUTED)
        q = loaded.to(tl.float32)
        left = length - block * BLOCK
        at = plane * blocks + block
        shift = tl.zeros([BLOCK], tl.float32)
        if SMOOTH_K:
            shift = tl.sum(q * center[None, :], 1)
        tl.store(shift_ptr + at * BLOCK + n, shift)
        mean = tl.sum(q, 0) / tl.minimum(left, BLOCK)
        tl.store(mean_ptr + at * HEAD_DIM + offs_d, mean, mask=column)
        if SMOOTH_Q:
            q = tl.where((n < left)[:, None] & column[None, :], q - mean[None, :], 0.0)
        if ROTATE:
            q = _turned(loaded, BLOCK_D)
        peak = tl.maximum(tl.max(tl.abs(q), 1), 1e-12)
        tl.store(scale_ptr + at * BLOCK + n, peak / 127)
        out = _round_int8(q * tl.div_rn(tl.full([BLOCK], 127.0, tl.float32), peak)[:, None])
        tl.store(out_ptr + at * (BLOCK * HEAD_DIM) + out_at, out, mask=column[None, :])


@triton.jit
def _quantize_keys(
    k_ptr,
    rows_ptr,
    k_sum_ptr,
    out_ptr,
    scale_ptr,
    mean_ptr,
    plane,
    stride_s,
    length,
    blocks,
    chunks,
    sampled,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNKS: tl.constexpr,
    PERMUTED: tl.constexpr,
    SMOOTH_K: tl.constexpr,
    THREAD_SCALES: tl.constexpr,
    ROTATE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """This program's blocks of a plane of k: integers, scales for the block or its four groups, block means."""
    n, offs_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    column = offs_d < HEAD_DIM
    out_at = n[:, None] * HEAD_DIM + tl.max_contiguous(offs_d, STORED)[None, :]
    if SMOOTH_K:
        center = _mean_key(k_sum_ptr, plane, chunks, sampled, HEAD_DIM, BLOCK_D, CHUNKS)
        if ROTATE:
            center = _turned_vector(center, BLOCK_D)
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=STAGES):
        loaded = _load_block(k_ptr, rows_ptr, block, n, length, stride_s, HEAD_DIM, BLOCK_D, PERMUTED)
        k = loaded.to(tl.float32)
        left = length - block * BLOCK
        at = plane * blocks + block
        mean = tl.sum(k, 0) / tl.minimum(left, BLOCK)
        tl.store(mean_ptr + at * HEAD_DIM + offs_d, mean, mask=column)
        if ROTATE:
            k = _turned(loaded, BLOCK_D)
        if SMOOTH_K:
            k = tl.where((n < left)[:, None] & column[None, :], k - center[None, :], 0.0)
        # A NaN or infinite key makes the scales NaN: the maximum alone would pass over a NaN. Keys and channels are
        # reduced at once: after one dimension alone, threads would have eight values to exchange, not one.
        broken = tl.sum(mean, 0) * 0.0
        if THREAD_SCALES:
            # The four groups of keys that four neighbouring threads of the products hold.
            GROUPS: tl.constexpr = (BLOCK // 8, 4, 2)
            grouped = tl.permute(tl.reshape(tl.abs(k), (BLOCK // 8, 4, 2, BLOCK_D)), (1, 0, 2, 3))
            peak = tl.maximum(tl.max(tl.reshape(grouped, (4, BLOCK * BLOCK_D // 4)), 1), 1e-12) + broken
            tl.store(scale_ptr + at * 4 + tl.arange(0, 4), peak / 127)
            inverse = tl.div_rn(tl.full([4], 127.0, tl.float32), peak)
            inverse = tl.reshape(tl.broadcast_to(inverse[None, :, None], GROUPS), (BLOCK,))
            out = _round_int8(k * inverse[:, None])
        else:
            peak = tl.maximum(tl.max(tl.reshape(tl.abs(k), (BLOCK * BLOCK_D,)), 0), 1e-12) + broken
            tl.store(scale_ptr + at, peak / 127)
            out = _round_int8(k * tl.div_rn(tl.full([], 127.0, tl.float32), peak))
        tl.store(out_ptr + at * (BLOCK * HEAD_DIM) + out_at, out, mask=column[None, :])


@triton.jit
def _rewrite_values(
    v_ptr,
    rows_ptr,
    v_max_ptr,
    out_ptr,
    scale_ptr,
    plane,
    batch,
    head,
    heads,
    stride_s,
    length,
    blocks,
    chunks,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNKS: tl.constexpr,
    PERMUTED: tl.constexpr,
    FP8: tl.constexpr,
):
    """This program's blocks of a plane of v, from the last to the first: in FP8, or permuted, or in another dtype."""
    n, offs_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    column = offs_d < HEAD_DIM
    place = n
    if FP8:
        # A thread's rows of a tile are 16 apart. They are to be neighbours in what is stored, in the order KEY_PLACE.
        place = n % 16 * (BLOCK // 16) + n // 16
        place = place // 16 * 16 + (place & 2) * 4 + (place & 8) // 2 + (place & 4) // 2 + (place & 1)
        peak = tl.maximum(tl.max(_chunk_values(v_max_ptr, plane, chunks, HEAD_DIM, BLOCK_D, CHUNKS), 1), 1e-12)
        most = tl.full([BLOCK_D], FP8_MAX_, tl.float32)
        inverse = tl.div_rn(most, peak)
        tl.store(scale_ptr + plane * HEAD_DIM + offs_d, tl.div_rn(peak, most), mask=column & (tl.program_id(0) == 0))
        out_at = offs_d.to(tl.int64)[:, None] * (blocks * BLOCK) + tl.max_contiguous(n, STORED)[None, :]
    step = tl.num_programs(0)
    # The maxima were found from the first to the last: the end of v may still be in the L2 cache. A block after the
    # last stands for none, all its rows are masked.
    block = tl.where(tl.program_id(0) < blocks, blocks - 1 - tl.program_id(0), blocks)
    ahead = _load_block(v_ptr, rows_ptr, block, place, length, stride_s, HEAD_DIM, BLOCK_D, PERMUTED)
    for done in range(tl.program_id(0), blocks, step):
        block = blocks - 1 - done
        # One block ahead, in registers: out of the pipeliner's buffers the compiler would read tiles that are to be
        # transposed column by column, with half of a warp in one bank of shared memory.
        v = ahead
        following = tl.where(step <= block, block - step, blocks)
        ahead = _load_block(v_ptr, rows_ptr, following, place, length, stride_s, HEAD_DIM, BLOCK_D, PERMUTED)
        if FP8:
            stored = (v.to(tl.float32) * inverse[None, :]).to(tl.float8e4nv)
            stored = tl.permute(tl.reshape(stored, (BLOCK // 16, 16, BLOCK_D)), (2, 1, 0))
            to = out_ptr + plane * HEAD_DIM * blocks * BLOCK + block * BLOCK + out_at
            tl.store(to, tl.reshape(stored, (BLOCK_D, BLOCK)), mask=column[:, None])
        else:
            slot = block * BLOCK + n
            to = ((batch * length + slot)[:, None] * heads + head) * HEAD_DIM + offs_d[None, :]
            tl.store(out_ptr + to, v, mask=(slot < length)[:, None] & column[None, :])


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
    REWRITE: tl.constexpr,
    THREAD_SCALES: tl.constexpr,
    ROTATE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Every ``num_programs(0)``-th block of one head's (program axis 1) q, k or, where it is rewritten, v (axis 2)."""
    plane = tl.program_id(1).to(tl.int64)
    batch, head = plane // heads, plane % heads
    rows_ptr += batch * rows_batch_stride + head * rows_head_stride
    if tl.program_id(2) == 0:
        _quantize_queries(
            q_ptr + batch * stride_qb + head * stride_qh,
            rows_ptr,
            k_sum_ptr,
            q_out_ptr,
            q_scale_ptr,
            q_mean_ptr,
            q_shift_ptr,
            plane,
            stride_qs,
            q_len,
            q_blocks,
            k_chunks,
            sampled,
            BLOCK_Q,
            BLOCK_D,
            HEAD_DIM,
            K_CHUNKS,
            PERMUTED,
            SMOOTH_K,
            SMOOTH_Q,
            ROTATE,
            STAGES,
        )
    if tl.program_id(2) == 1:
        _quantize_keys(
            k_ptr + batch * stride_kb + head * stride_kh,
            rows_ptr,
            k_sum_ptr,
            k_out_ptr,
            k_scale_ptr,
            k_mean_ptr,
            plane,
            stride_ks,
            kv_len,
            k_blocks,
            k_chunks,
            sampled,
            BLOCK_K,
            BLOCK_D,
            HEAD_DIM,
            K_CHUNKS,
            PERMUTED,
            SMOOTH_K,
            THREAD_SCALES,
            ROTATE,
            STAGES,
        )
    if REWRITE and tl.program_id(2) == 2:
        _rewrite_values(
            v_ptr + batch * stride_vb + head * stride_vh,
            rows_ptr,
            v_max_ptr,
            v_out_ptr,
            v_scale_ptr,
            plane,
            batch,
            head,
            heads,
            stride_vs,
            kv_len,
            k_blocks,
            v_chunks,
            BLOCK_K,
            BLOCK_D,
            HEAD_DIM,
            V_CHUNKS,
            PERMUTED,
            FP8,
        )
