"""Arithmetic of the Hopper kernel: a warpgroup's 64 query rows against the blocks that the producer loads."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_producer import tile_header

LN_2_ = gl.constexpr(0.6931471805599453)
# Weights are at most 1 and e4m3 holds 448: its base-2 logarithm, added to the exponents.
FP8_LIFT = gl.constexpr(8.807354922057604)
# 1.5 * 2**23: as bits of a float32, integers of less than 2**22 added to them are added to the number.
INTEGER_BIAS = gl.constexpr(12582912.0)
INTEGER_BIAS_BITS = gl.constexpr(0x4B400000)


@gluon.jit
def hide_keys(
    scores,
    block,
    bit_row,
    bits_ptr,
    key_mask_ptr,
    rows_ptr,
    kv_len,
    HALF: gl.constexpr,
    BLOCK_K: gl.constexpr,
    LAYOUT: gl.constexpr,
    PERMUTED: gl.constexpr,
    HAS_BITS: gl.constexpr,
    HAS_KEY_MASK: gl.constexpr,
):
    """Scores of a partial block with ``-inf`` in place of every key that a query does not see."""
    offs_n = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, LAYOUT))
    slot = block * BLOCK_K + offs_n
    inside = slot < kv_len
    if HAS_KEY_MASK:
        key_row = slot
        if PERMUTED:
            key_row = gl.load(rows_ptr + slot, mask=inside, other=0)
        inside = inside & (gl.load(key_mask_ptr + key_row, mask=inside, other=0) != 0)
    scores = gl.where(inside[None, :], scores, float("-inf"))
    if HAS_BITS:
        words_per_row: gl.constexpr = BLOCK_K // 32
        offs_m = HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
        base = bits_ptr + gl.maximum(bit_row, 0).to(gl.int64) * (128 * words_per_row)
        words = gl.load(base + offs_m[:, None] * words_per_row + (offs_n // 32)[None, :])
        seen = (((words >> (offs_n % 32)[None, :]) & 1) != 0) | (bit_row < 0)
        scores = gl.where(seen, scores, float("-inf"))
    return scores


@gluon.jit
def block_softmax(scores, peak, total, factor, LIFT: gl.constexpr, BIASED: gl.constexpr):
    """float32 weights ``2 ** (LIFT + scores - peak)`` of a block, the row state, and what shrinks older sums.

    ``BIASED`` scores are larger by ``INTEGER_BIAS`` than the products; taking it off in the exponent rounds by at
    most one unit of an integer product, a hundredth of what rounding q and k to INT8 does.
    """
    largest = gl.max(scores, 1)
    if BIASED:
        largest -= INTEGER_BIAS
    new_peak = gl.maximum(peak, largest * factor)
    # A row that has seen nothing keeps peak -inf; 0 in its place avoids inf - inf.
    base = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    offset = base - LIFT
    if BIASED:
        offset += INTEGER_BIAS * factor
    weights = gl.exp2(scores * factor[:, None] - offset[:, None])
    shrink = gl.exp2(peak - base)
    total = total * shrink + gl.sum(weights, 1)
    return weights, new_peak, total, shrink


@gluon.jit
def by_thread(scores):
    """``[64, keys]`` as ``[64, keys / 8, 4, 2]``: keys ``8 n + 2 c + (0, 1)`` are held by lane ``c`` of four."""
    return scores.reshape([64, scores.shape[1] // 8, 4, 2])


@gluon.jit
def thread_softmax(scores, peak, total, row_scale, key_scale, LIFT: gl.constexpr, BIASED: gl.constexpr):
    """:func:`block_softmax` with a key scale for each of the four lanes that hold a row.

    All that a thread holds of a row has one factor, so nothing more is done for an element than with one scale
    a block. ``total [64, 4]`` stays apart for the lanes and is added up after the last block.
    """
    wide = by_thread(scores)
    largest = gl.max(gl.max(wide, 3), 1)
    LANES: gl.constexpr = largest.type.layout
    LANES_ROW: gl.constexpr = gl.SliceLayout(1, LANES)
    ROW: gl.constexpr = peak.type.layout
    factor = gl.convert_layout(row_scale, LANES_ROW)[:, None] * key_scale[None, :]
    if BIASED:
        largest -= INTEGER_BIAS
    new_peak = gl.maximum(peak, gl.convert_layout(gl.max(largest * factor, 1), ROW))
    base = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    offset = gl.convert_layout(base - LIFT, LANES_ROW)[:, None]
    if BIASED:
        offset = offset + INTEGER_BIAS * factor
    weights = gl.exp2(wide * factor.expand_dims(1).expand_dims(3) - offset.expand_dims(1).expand_dims(3))
    shrink = gl.exp2(peak - base)
    total = total * gl.convert_layout(shrink, LANES_ROW)[:, None] + gl.sum(gl.sum(weights, 3), 1)
    flat = weights.reshape([64, scores.shape[1]])
    return gl.convert_layout(flat, scores.type.layout, assert_trivial=True), new_peak, total, shrink


@gluon.jit
def scores_as_float(products, BIASED: gl.constexpr):
    """float32 of the integer or float32 products; biased ones are the bits of a float already."""
    if BIASED:
        return products.to(gl.float32, bitcast=True)
    return products.to(gl.float32)


@gluon.jit
def pack_fp8(weights):
    """e4m3 weights, four keys a word, in the order KEY_PLACE of the stored values.

    In this order the scores' registers are the operand's. Words, since the compiler would carry bytes from one
    block to the next one by one.
    """
    keys: gl.constexpr = weights.shape[1]
    place = weights.reshape([64, keys // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([64, keys // 4, 2, 2])
    even, odd = gl.split(place)
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }
        """,
        "=r,f,f,f,f",
        [first, second, third, fourth],
        dtype=gl.uint32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def unpack_fp8(words, OPERAND: gl.constexpr):
    """The words of :func:`pack_fp8` as left operand; no instruction, they are its registers."""
    keys: gl.constexpr = words.shape[1] * 4
    even = gl.join((words & 255).to(gl.uint8), ((words >> 16) & 255).to(gl.uint8))
    odd = gl.join(((words >> 8) & 255).to(gl.uint8), (words >> 24).to(gl.uint8))
    bits = gl.join(even, odd).reshape([64, keys])
    return gl.convert_layout(bits.to(gl.float8e4nv, bitcast=True), OPERAND, assert_trivial=True)


@gluon.jit
def consume(
    out_desc,
    shared,
    lists,
    sizes,
    state,
    HALF: gl.constexpr,
    BLOCK_K: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr,
    PERMUTED: gl.constexpr,
    HAS_BITS: gl.constexpr,
    HAS_KEY_MASK: gl.constexpr,
    TAKE_TURNS: gl.constexpr,
    QUANTIZED: gl.constexpr,
    FP8: gl.constexpr,
    THREAD_SCALES: gl.constexpr,
    BIASED: gl.constexpr,
):
    """Attention of 64 query rows of every tile of this program."""
    q_smem, k_smem, v_smem, o_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, order = shared
    counts_ptr, fulls_ptr, index_ptr, bit_rows_ptr, bits_ptr, rows_ptr, key_mask_ptr = lists
    nq, heads, num_tiles, mask_batch_stride, mask_head_stride, list_length, q_rows, k_rows, _plane_cols = sizes
    (
        q_ptr,
        out_ptr,
        lse_ptr,
        q_scale_ptr,
        k_scale_ptr,
        v_scale_ptr,
        q_shift_ptr,
        stride_qb,
        stride_qs,
        stride_qh,
        stride_ob,
        stride_os,
        stride_oh,
        rows_batch_stride,
        rows_head_stride,
        q_len,
        kv_len,
        scale_log2,
    ) = state
    GATHER_Q: gl.constexpr = PERMUTED and not QUANTIZED
    dtype: gl.constexpr = o_smem.dtype
    K_INSTR: gl.constexpr = 32 if QUANTIZED else 16
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_K, K_INSTR]
    )
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 32 if FP8 else 16]
    )
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=4 if FP8 else 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    LIFT: gl.constexpr = FP8_LIFT if FP8 else 0.0
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    step = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    beat = gl.to_tensor(0)
    programs = gl.num_programs(0)
    # Integer sums that start at the bits of 1.5 * 2**23 need no conversion to float.
    start = gl.full(
        [64, BLOCK_K], INTEGER_BIAS_BITS if BIASED else 0, gl.int32 if QUANTIZED else gl.float32, layout=S_LAYOUT
    )
    LANES: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, by_thread(start).type.layout))
    if TAKE_TURNS and HALF == 1:
        mbarrier.arrive(order.index(0), count=1)
    list_row, count, full = tile_header(
        gl.program_id(0), num_tiles, nq, heads, mask_batch_stride, mask_head_stride, counts_ptr, fulls_ptr
    )
    for tile in range(gl.program_id(0), num_tiles, programs):
        next_row, next_count, next_full = tile_header(
            tile + programs, num_tiles, nq, heads, mask_batch_stride, mask_head_stride, counts_ptr, fulls_ptr
        )
        plane = (tile // nq).to(gl.int64)
        batch, head = plane // heads, plane % heads
        at = index_ptr + list_row.to(gl.int64) * list_length
        bits_at = bit_rows_ptr + list_row.to(gl.int64) * list_length
        rows_at = rows_ptr + batch * rows_batch_stride + head * rows_head_stride
        hidden_at = key_mask_ptr + batch * kv_len
        first_slot = (tile % nq) * 128 + HALF * 64
        buffer = 0 if GATHER_Q else (turn % Q_STAGES) * 2
        q_tile = q_smem.index(buffer + HALF)
        o_tile = o_smem.index((turn % Q_STAGES) * 2 + HALF if not (GATHER_Q or QUANTIZED) else HALF)
        acc = gl.zeros([64, HEAD_DIM], gl.float32, layout=O_LAYOUT)
        peak = gl.full([64], float("-inf"), gl.float32, layout=ROW)
        if THREAD_SCALES:
            total = gl.zeros([64, 4], gl.float32, layout=LANES)
        else:
            total = gl.zeros([64], gl.float32, layout=ROW)
        slot = first_slot + gl.arange(0, 64, layout=ROW)
        if QUANTIZED:
            row_scale = gl.load(q_scale_ptr + plane * q_rows + slot) * scale_log2
            SCALES: gl.constexpr = 4 if THREAD_SCALES else 1
            scales_at = k_scale_ptr + plane * (k_rows // BLOCK_K) * SCALES
            if THREAD_SCALES:
                scales_at += gl.arange(0, 4, layout=gl.SliceLayout(0, LANES))
            key_scale = gl.load(scales_at + gl.load(at, mask=count > 0, other=0) * SCALES)
            following = gl.load(at + 1, mask=count > 1, other=0)
        else:
            row_scale = gl.full([64], scale_log2, gl.float32, layout=ROW)
        if count > 0:
            if GATHER_Q:
                gather_slot = first_slot + gl.arange(0, 64, layout=gl.SliceLayout(1, COPY))
                gather_columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, COPY))
                gather_live = gather_slot < q_len
                # The hint is given here and not in a function, whose arguments would not carry it: rows start at
                # multiples of 16 bytes, which strides unknown to the compiler hide; it would read 2 bytes at a time.
                gather_row = gl.load(rows_at + gather_slot, mask=gather_live, other=0).to(gl.int64)
                q_at = (
                    q_ptr
                    + batch * stride_qb
                    + head * stride_qh
                    + gather_row[:, None] * stride_qs
                    + gather_columns[None, :]
                )
                q_at = gl.max_contiguous(gl.multiple_of(q_at, [16, 16]), [1, 8])
                q_tile.store(gl.load(q_at, mask=gather_live[:, None], other=0.0))
                fence_async_shared()
            else:
                mbarrier.wait(q_full.index(buffer + HALF), (turn // Q_STAGES) & 1)

            stage = step % STAGES
            mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
            token = warpgroup_mma(q_tile, k_smem.index(stage).permute([1, 0]), start, use_acc=BIASED, is_async=True)
            scores = scores_as_float(warpgroup_mma_wait(0, deps=[token]), BIASED)
            mbarrier.arrive(k_empty.index(stage), count=1)
            if full == 0:
                scores = hide_keys(
                    scores,
                    gl.load(at),
                    gl.load(bits_at),
                    bits_ptr,
                    hidden_at,
                    rows_at,
                    kv_len,
                    HALF,
                    BLOCK_K,
                    S_LAYOUT,
                    PERMUTED,
                    HAS_BITS,
                    HAS_KEY_MASK,
                )
            if THREAD_SCALES:
                likely, peak, total, shrink = thread_softmax(scores, peak, total, row_scale, key_scale, LIFT, BIASED)
            else:
                factor = row_scale
                if QUANTIZED:
                    factor = row_scale * key_scale
                likely, peak, total, shrink = block_softmax(scores, peak, total, factor, LIFT, BIASED)
            if FP8:
                weights = pack_fp8(likely)
            step += 1
            mbarrier.wait(k_full.index(step % STAGES), (step // STAGES) & 1, pred=count > 1)

            for partial in gl.static_range(2):
                begin = gl.maximum(full, 1) if partial else 1
                end = count if partial else full
                for entry in range(begin, end):
                    if QUANTIZED:
                        # Two dependent loads, each one block ahead of its use.
                        key_scale = gl.load(scales_at + following * SCALES)
                        following = gl.load(at + entry + 1, mask=entry + 1 < count, other=0)
                    stage = step % STAGES
                    last = (step - 1) % STAGES
                    if not FP8:
                        # Only now, while the scores are being made; and float32 is carried without repacking.
                        weights = gl.convert_layout(likely.to(dtype), OPERAND)
                    if TAKE_TURNS:
                        mbarrier.wait(order.index(HALF), beat & 1)
                    token = warpgroup_mma(
                        q_tile, k_smem.index(stage).permute([1, 0]), start, use_acc=BIASED, is_async=True
                    )
                    mbarrier.wait(v_full.index(last), ((step - 1) // STAGES) & 1)
                    earlier = gl.convert_layout(shrink, O_ROW)[:, None]
                    if FP8:
                        fresh = gl.zeros([64, HEAD_DIM], gl.float32, layout=O_LAYOUT)
                        acc_token = warpgroup_mma(
                            unpack_fp8(weights, OPERAND),
                            v_smem.index(last).permute([1, 0]),
                            fresh,
                            use_acc=False,
                            is_async=True,
                        )
                    else:
                        # While the scores are being made.
                        acc = acc * earlier
                        acc_token = warpgroup_mma(weights, v_smem.index(last), acc, is_async=True)
                    if TAKE_TURNS:
                        mbarrier.arrive(order.index(1 - HALF), count=1)
                        beat += 1
                    scores = scores_as_float(warpgroup_mma_wait(1, deps=[token]), BIASED)
                    mbarrier.arrive(k_empty.index(stage), count=1)
                    if partial:
                        scores = hide_keys(
                            scores,
                            gl.load(at + entry),
                            gl.load(bits_at + entry),
                            bits_ptr,
                            hidden_at,
                            rows_at,
                            kv_len,
                            HALF,
                            BLOCK_K,
                            S_LAYOUT,
                            PERMUTED,
                            HAS_BITS,
                            HAS_KEY_MASK,
                        )
                    if THREAD_SCALES:
                        likely, peak, total, shrink = thread_softmax(
                            scores, peak, total, row_scale, key_scale, LIFT, BIASED
                        )
                    else:
                        factor = row_scale
                        if QUANTIZED:
                            factor = row_scale * key_scale
                        likely, peak, total, shrink = block_softmax(scores, peak, total, factor, LIFT, BIASED)
                    step += 1
                    # The next keys are awaited here, before the product: the wait's branch keeps the assembler
                    # from moving the wait for the product up, in front of the exponentials it shall overlap.
                    mbarrier.wait(k_full.index(step % STAGES), (step // STAGES) & 1, pred=entry + 1 < count)
                    if FP8:
                        # The wait takes no 8-bit operand; the assembler keeps its registers until here.
                        product = warpgroup_mma_wait(0, deps=[acc_token])
                        acc = acc * earlier + product
                    else:
                        acc, weights = warpgroup_mma_wait(0, deps=[acc_token, weights])
                    mbarrier.arrive(v_empty.index(last), count=1)
                    if FP8:
                        # The product takes the registers that float32 weights would be carried in.
                        weights = pack_fp8(likely)
            if not FP8:
                weights = gl.convert_layout(likely.to(dtype), OPERAND)
            last = (step - 1) % STAGES
            mbarrier.wait(v_full.index(last), ((step - 1) // STAGES) & 1)
            acc = acc * gl.convert_layout(shrink, O_ROW)[:, None]
            if FP8:
                fresh = gl.zeros([64, HEAD_DIM], gl.float32, layout=O_LAYOUT)
                acc_token = warpgroup_mma(
                    unpack_fp8(weights, OPERAND),
                    v_smem.index(last).permute([1, 0]),
                    fresh,
                    use_acc=False,
                    is_async=True,
                )
                product = warpgroup_mma_wait(0, deps=[acc_token])
                acc = acc + product
            else:
                acc_token = warpgroup_mma(weights, v_smem.index(last), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc_token])
            mbarrier.arrive(v_empty.index(last), count=1)

        if THREAD_SCALES:
            total = gl.convert_layout(gl.sum(total, 1), ROW)
        nothing = total == 0.0
        safe = gl.where(nothing, 1.0, total)
        lse = (peak + gl.log2(safe) - LIFT) * LN_2_
        row = slot
        if PERMUTED:
            row = gl.load(rows_at + slot, mask=slot < q_len, other=0)
        if QUANTIZED:
            # Smoothing took scale * q . mean(k) from every logit of the row.
            lse += gl.load(q_shift_ptr + plane * q_rows + slot) * (scale_log2 * LN_2_)
        lse = gl.where(nothing, float("-inf"), lse)
        gl.store(lse_ptr + plane * q_len + row, lse, mask=slot < q_len)
        acc = acc * gl.convert_layout(1.0 / safe, O_ROW)[:, None]
        columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, O_LAYOUT))
        if FP8:
            acc = acc * gl.load(v_scale_ptr + plane * HEAD_DIM + columns)[None, :]
        out_at = out_ptr + batch * stride_ob + head * stride_oh
        if count > 0:
            # Through shared memory the output leaves in whole lines; Q's buffer is free by now.
            o_tile.store(acc.to(dtype))
            if PERMUTED:
                copy_slot = first_slot + gl.arange(0, 64, layout=gl.SliceLayout(1, COPY))
                copy_columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, COPY))
                live = copy_slot < q_len
                copy_row = gl.load(rows_at + copy_slot, mask=live, other=0).to(gl.int64)
                whole = o_tile.load(COPY)
                copy_at = out_at + copy_row[:, None] * stride_os + copy_columns[None, :]
                copy_at = gl.max_contiguous(gl.multiple_of(copy_at, [16, 16]), [1, 8])
                gl.store(copy_at, whole, mask=live[:, None])
            else:
                fence_async_shared()
                tma.async_copy_shared_to_global(out_desc, [first_slot, (head * HEAD_DIM).to(gl.int32)], o_tile)
                tma.store_wait(pendings=0)
            if not GATHER_Q:
                mbarrier.arrive(q_empty.index(buffer + HALF), count=1)
            turn += 1
        else:
            blank_slot = first_slot + gl.arange(0, 64, layout=gl.SliceLayout(1, O_LAYOUT))
            blank_live = blank_slot < q_len
            blank_row = blank_slot
            if PERMUTED:
                blank_row = gl.load(rows_at + blank_slot, mask=blank_live, other=0)
            blank_at = out_at + blank_row.to(gl.int64)[:, None] * stride_os + columns[None, :]
            gl.store(blank_at, acc.to(dtype), mask=blank_live[:, None])
        list_row, count, full = next_row, next_count, next_full
