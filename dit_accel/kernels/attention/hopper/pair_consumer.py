"""Consumer of the Hopper kernel for blocks of 64 queries: each warpgroup of a program has a list of its own.

Both read one stream of blocks: first those that both lists hold, then one of each in turn, then what is left of the
longer list (``tile_scheduler.pair_entry``). Each consumer takes its own and passes the other's by.

Why it may pass them by, with barriers whose phase is known by its parity alone. Before a consumer waits for the keys of
its next block, at most two steps on, it has waited for the values of this one. The producer asked for those after the
keys that lay in the next block's buffer had been given back, so that those keys had come, whoever read them. Of what is
left of the longer list the other consumer waits for every block, and gives it back unread.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .consumer import advance_stage, pv_gemm
from .epilogue import epilogue
from .means import kept_of_step, kept_row, mean_scores
from .named_barriers import pair_release, warp_scheduler_barrier_arrive, warp_scheduler_barrier_sync
from .scales import key_scales_at, query_scales
from .softmax import (
    FP8_MAX_OFFSET,
    FP8_RESCALE_THRESHOLD,
    RESCALE_THRESHOLD,
    ROW_MAX_INIT,
    apply_mask,
    block_row_max,
    by_thread,
    pack_p_fp8,
    rescale_and_add_o,
    rescale_o,
    scale_apply_exp2,
    update_row_max,
)
from .tile_scheduler import get_current_work, initial_work_tile, pair_header, tile_block


@gluon.jit
def own_header(tile, sizes, lists, means, WG: gl.constexpr, MEANS: gl.constexpr):
    """This consumer's row of the lists, its blocks, those of the other one, its full ones, and those of both."""
    pair = (tile // sizes.nq) * sizes.mask_head_stride + tile_block(tile, sizes.nq)
    first, second, first_full, second_full, both = pair_header(pair, tile < sizes.num_tiles, lists, means, MEANS)
    if WG == 0:
        return pair * 2, first, second, first_full, both
    else:
        return pair * 2 + 1, second, first, second_full, both


@gluon.jit
def skip_stage(stage, phase, skip, STAGES: gl.constexpr):
    """Buffer and phase a step on, if ``skip``."""
    next_stage, next_phase = advance_stage(stage, phase, STAGES)
    return gl.where(skip, next_stage, stage), gl.where(skip, next_phase, phase)


@gluon.jit
def consume_pair(
    shared,
    scheduler,
    lists,
    sizes,
    tensors,
    means,
    WG: gl.constexpr,
    BLOCK_K: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    PERMUTED: gl.constexpr,
    HAS_BITS: gl.constexpr,
    HAS_KEY_MASK: gl.constexpr,
    TAKE_TURNS: gl.constexpr,
    QUANTIZED: gl.constexpr,
    FP8: gl.constexpr,
    THREAD_SCALES: gl.constexpr,
    WIDE_STEPS: gl.constexpr,
    KEEP_Q: gl.constexpr,
    MEANS: gl.constexpr,
):
    """Attention of one query block of every pair of this program, and with ``MEANS`` to those of what it leaves out.

    A tile ends with its last product, unlike in :func:`~.consumer.consume`: the other list may be longer, and the
    stream could not go on while this consumer still needed its last values. Those are given back with the next step
    that this consumer has to do with, at most two steps on.
    """
    gl.static_assert(BLOCK_K == 64 and KEEP_Q and not WIDE_STEPS)
    gl.static_assert(not (MEANS and (QUANTIZED or HAS_BITS or HAS_KEY_MASK)))
    dtype: gl.constexpr = shared.o_smem.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_K, 32 if QUANTIZED else 16]
    )
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 32 if FP8 else 16]
    )
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=4 if FP8 else 2)
    # In registers: products of 64 keys read as many bytes of q as of k, and shared memory could not keep up.
    QUERIES: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=S_LAYOUT, k_width=4 if QUANTIZED else 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    MAX_OFFSET: gl.constexpr = FP8_MAX_OFFSET if FP8 else 0.0
    THRESHOLD: gl.constexpr = FP8_RESCALE_THRESHOLD if FP8 else RESCALE_THRESHOLD
    SCALES: gl.constexpr = 4 if THREAD_SCALES else 1
    start = gl.zeros([64, BLOCK_K], gl.int32 if QUANTIZED else gl.float32, layout=S_LAYOUT)
    LANES: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, by_thread(start).type.layout))
    if not QUANTIZED:
        score_scale = gl.full([64, 1], tensors.softmax_scale_log2, gl.float32, layout=LANES)
    # Of scores that are in base 2 already.
    one = gl.full([64, 1], 1.0, gl.float32, layout=LANES)
    # Of the next step of the stream.
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    turn = gl.to_tensor(0)
    tile, work_idx = initial_work_tile(scheduler, PERMUTED and not QUANTIZED)
    if TAKE_TURNS and WG == 1:
        warp_scheduler_barrier_arrive(WG, sizes.num_tiles)
    list_row, count, other, full, both = own_header(tile, sizes, lists, means, WG, MEANS)
    while tile < sizes.num_tiles:
        head = (tile // sizes.nq).to(gl.int64)
        at = lists.index_ptr + list_row.to(gl.int64) * sizes.list_length
        bits_at = lists.bit_rows_ptr + list_row.to(gl.int64) * sizes.list_length
        perm_at = lists.perm_ptr + head * tensors.perm_head_stride
        key_mask_at = lists.key_mask_ptr + head * tensors.perm_head_stride
        first_slot = tile_block(tile, sizes.nq) * 128 + WG * 64
        if MEANS:
            # Lists go on behind blocks of means.
            at -= means.steps
            bits_at -= means.steps
            kept_at, kept_words = kept_row(head, tile_block(tile, sizes.nq) * 2 + WG, means)
        # Entries of both lists from ``both`` to ``short`` come in turn.
        short = gl.minimum(count, other)
        next_tile = get_current_work(scheduler, work_idx)
        next_row, next_count, next_other, next_full, next_both = own_header(next_tile, sizes, lists, means, WG, MEANS)
        if count + other > 0:
            buffer = (turn % 2) * 2 + WG
            mbarrier.wait(shared.q_full.index(buffer), (turn // 2) & 1)
            acc = gl.zeros([64, HEAD_DIM], gl.float32, layout=O_LAYOUT)
            row_max = gl.full([64, 4], ROW_MAX_INIT, gl.float32, layout=LANES)
            row_sum = gl.zeros([64, 4], gl.float32, layout=LANES)
            if count > 0:
                if QUANTIZED:
                    row_scale = query_scales(head, first_slot, sizes, tensors, LANES)
                    scales_at = key_scales_at(head, sizes, tensors, BLOCK_K, THREAD_SCALES, LANES)
                    score_scale = row_scale * gl.load(scales_at + gl.load(at) * SCALES)
                    following = gl.load(at + 1, mask=count > 1, other=0)
                queries = shared.q_smem.index(buffer).load(QUERIES)
                # Of the second list, where the first one begins with a block of its own.
                stage, phase = skip_stage(stage, phase, (both < WG) & (short > 0), STAGES)
                mbarrier.wait(shared.k_full.index(stage), phase)
                qk_token = warpgroup_mma(
                    queries, shared.k_smem.index(stage).permute([1, 0]), start, use_acc=False, is_async=True
                )
                first_scores = warpgroup_mma_wait(0, deps=[qk_token]).to(gl.float32)
                if MEANS:
                    kept, kept_too = kept_of_step(gl.to_tensor(0), kept_at, kept_words, MEANS)
                    first_scores = mean_scores(
                        first_scores, gl.to_tensor(0), kept, kept_too, tensors.softmax_scale_log2, means, MEANS
                    )
                elif full == 0:
                    first_scores = apply_mask(
                        first_scores,
                        gl.load(at),
                        gl.load(bits_at),
                        lists.bits_ptr,
                        key_mask_at,
                        tensors.kv_len,
                        0,
                        BLOCK_K,
                        S_LAYOUT,
                        HAS_BITS,
                        HAS_KEY_MASK,
                        64,
                    )
                first_scale = one if MEANS else score_scale
                block_max = block_row_max(first_scores, first_scale)
                row_max, acc_scale, rescale = update_row_max(block_max, row_max, THRESHOLD)
                p, row_sum = scale_apply_exp2(first_scores, row_max, acc_scale, row_sum, first_scale, MAX_OFFSET)
                if FP8:
                    p_operand = pack_p_fp8(p)
                prev_stage = stage
                next_stage, next_phase = advance_stage(stage, phase, STAGES)
                next_stage, next_phase = skip_stage(next_stage, next_phase, (both <= WG) & (short > WG), STAGES)
                # In this order: see the head of this file.
                mbarrier.wait(shared.v_full.index(stage), phase)
                mbarrier.wait(shared.k_full.index(next_stage), next_phase, pred=count > 1)
                pair_release(stage, (both == 0) & (short > 0))
                stage, phase = next_stage, next_phase

                # Means, full blocks, and partial ones.
                for kind in gl.static_range(0 if MEANS else 1, 3):
                    if kind == 0:
                        begin, end = 1, means.steps
                    elif kind == 1:
                        begin, end = means.steps if MEANS else 1, full
                    else:
                        begin, end = gl.maximum(full, 1), count
                    if kind == 2:
                        block = gl.load(at + begin, mask=begin < end, other=0)
                        bit_row = gl.load(bits_at + begin, mask=begin < end, other=0)
                    for entry in range(begin, end):
                        if QUANTIZED:
                            # Two dependent loads, each one block ahead of its use.
                            score_scale = row_scale * gl.load(scales_at + following * SCALES)
                            following = gl.load(at + entry + 1, mask=entry + 1 < count, other=0)
                        if not FP8:
                            p_operand = gl.convert_layout(p.to(dtype), OPERAND)
                        if TAKE_TURNS:
                            warp_scheduler_barrier_sync(WG)
                        qk_token = warpgroup_mma(
                            queries, shared.k_smem.index(stage).permute([1, 0]), start, use_acc=False, is_async=True
                        )
                        if not FP8:
                            # While the scores are being made.
                            acc = rescale_o(acc, acc_scale, rescale)
                        prev_acc_scale = acc_scale
                        pv_token = pv_gemm(p_operand, shared.v_smem.index(prev_stage), acc, entry > 1, FP8, OPERAND)
                        if kind == 0:
                            first, second = kept_of_step(entry, kept_at, kept_words, MEANS)
                        scores = warpgroup_mma_wait(1, deps=[qk_token])
                        step_scale = score_scale
                        if kind == 0:
                            scores = mean_scores(scores, entry, first, second, tensors.softmax_scale_log2, means, MEANS)
                            step_scale = one
                        elif kind == 2:
                            scores = apply_mask(
                                scores.to(gl.float32),
                                block,
                                bit_row,
                                lists.bits_ptr,
                                key_mask_at,
                                tensors.kv_len,
                                0,
                                BLOCK_K,
                                S_LAYOUT,
                                HAS_BITS,
                                HAS_KEY_MASK,
                                64,
                            )
                            block = gl.load(at + entry + 1, mask=entry + 1 < end, other=0)
                            bit_row = gl.load(bits_at + entry + 1, mask=entry + 1 < end, other=0)
                        block_max = block_row_max(scores, step_scale)
                        row_max, acc_scale, rescale = update_row_max(block_max, row_max, THRESHOLD)
                        if TAKE_TURNS:
                            warp_scheduler_barrier_arrive(WG, sizes.num_tiles)
                        p, row_sum = scale_apply_exp2(scores, row_max, acc_scale, row_sum, step_scale, MAX_OFFSET)
                        next_stage, next_phase = advance_stage(stage, phase, STAGES)
                        skip = (both <= entry + WG) & (entry + WG < short)
                        next_stage, next_phase = skip_stage(next_stage, next_phase, skip, STAGES)
                        mbarrier.wait(shared.v_full.index(stage), phase)
                        mbarrier.wait(shared.k_full.index(next_stage), next_phase, pred=entry + 1 < count)
                        if FP8:
                            # As in consumer.py: the assembler keeps the operand's registers until here.
                            pv = warpgroup_mma_wait(0, deps=[pv_token])
                            acc = rescale_and_add_o(acc, prev_acc_scale, pv)
                        else:
                            acc, p_operand = warpgroup_mma_wait(0, deps=[pv_token, p_operand])
                        pair_release(stage, (both <= entry) & (entry < short))
                        prev_stage, stage, phase = stage, next_stage, next_phase
                        if FP8:
                            p_operand = pack_p_fp8(p)

                if not FP8:
                    acc = rescale_o(acc, acc_scale, rescale)
                    p_operand = gl.convert_layout(p.to(dtype), OPERAND)
                pv_token = pv_gemm(p_operand, shared.v_smem.index(prev_stage), acc, count > 1, FP8, OPERAND)
                pv = warpgroup_mma_wait(0, deps=[pv_token])
                if FP8:
                    acc = rescale_and_add_o(acc, acc_scale, pv)
                else:
                    acc = pv
            epilogue(
                acc,
                row_max,
                row_sum,
                tile,
                turn,
                shared,
                sizes,
                tensors,
                WG,
                HEAD_DIM,
                PERMUTED,
                QUANTIZED,
                FP8,
                ROW,
                O_LAYOUT,
                PAIRED=True,
            )
            for entry in range(count, other):
                # The other list goes on alone.
                if TAKE_TURNS:  # noqa: SIM102 - a compile-time condition around a run-time one
                    if entry > 0:
                        warp_scheduler_barrier_sync(WG)
                        warp_scheduler_barrier_arrive(WG, sizes.num_tiles)
                mbarrier.wait(shared.k_full.index(stage), phase)
                mbarrier.wait(shared.v_full.index(stage), phase)
                pair_release(stage, gl.to_tensor(False))
                stage, phase = advance_stage(stage, phase, STAGES)
            turn += 1
        else:
            # Nothing to read: zeros, and a log-sum-exp of -inf.
            blank_slot = first_slot + gl.arange(0, 64, layout=gl.SliceLayout(1, O_LAYOUT))
            blank_live = blank_slot < tensors.q_len
            blank_row = blank_slot
            if PERMUTED:
                blank_row = gl.load(perm_at + blank_slot, mask=blank_live, other=0)
            columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, O_LAYOUT))
            out_at = tensors.out_ptr + head * tensors.stride_oh
            blank_at = out_at + blank_row.to(gl.int64)[:, None] * tensors.stride_os + columns[None, :]
            gl.store(blank_at, gl.zeros([64, HEAD_DIM], dtype, layout=O_LAYOUT), mask=blank_live[:, None])
            unseen = gl.full([64], float("-inf"), gl.float32, layout=O_ROW)
            gl.store(tensors.lse_ptr + head * tensors.q_len + blank_row, unseen, mask=blank_live)
        tile, list_row, count, other, full, both = next_tile, next_row, next_count, next_other, next_full, next_both
        work_idx += 1
    if TAKE_TURNS and WG == 0:
        # What the other one passed last.
        warp_scheduler_barrier_sync(WG)
