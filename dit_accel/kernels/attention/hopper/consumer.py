"""Consumer of the Hopper kernel: a warpgroup's 64 query rows against the blocks that the producer loads."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .epilogue import epilogue
from .means import kept_of_step, kept_row, mean_scores
from .named_barriers import (
    consumer_release_k,
    consumer_release_v,
    warp_scheduler_barrier_arrive,
    warp_scheduler_barrier_sync,
)
from .scales import key_scales_at, query_scales
from .softmax import (
    FP8_MAX_OFFSET,
    FP8_RESCALE_THRESHOLD,
    RESCALE_THRESHOLD,
    ROW_MAX_INIT,
    apply_mask,
    block_row_max,
    by_thread,
    mask_two_blocks,
    pack_p_fp8,
    rescale_and_add_o,
    rescale_o,
    scale_apply_exp2,
    unpack_p_fp8,
    update_row_max,
)
from .tile_scheduler import get_current_work, initial_work_tile, tile_block, tile_header


@gluon.jit
def pv_gemm(p_operand, values, acc, use_acc, FP8: gl.constexpr, OPERAND: gl.constexpr):
    """Issue PV of a block: onto ``acc``, in 8 bits apart from it.

    Sums of e4m3 products keep too few bits for many blocks; the caller adds each in float32.
    """
    if FP8:
        LAYOUT: gl.constexpr = acc.type.layout
        fresh = gl.zeros([acc.shape[0], acc.shape[1]], gl.float32, layout=LAYOUT)
        words = unpack_p_fp8(p_operand, OPERAND)
        token = warpgroup_mma(words, values.permute([1, 0]), fresh, use_acc=False, is_async=True)
    else:
        token = warpgroup_mma(p_operand, values, acc, use_acc=use_acc, is_async=True)
    return token


@gluon.jit
def advance_stage(stage, phase, STAGES: gl.constexpr):
    """Buffer of the next step, and the phase of its barriers. Counted on: a step's remainder would take longer."""
    wraps = stage == STAGES - 1
    return gl.where(wraps, 0, stage + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def consumer_wait(shared, stage, phase, next_stage, next_phase, more):
    """Wait for a block's values, and if there are ``more``, for the next one's keys, which are loaded after them."""
    mbarrier.wait(shared.v_full.index(stage), phase)
    mbarrier.wait(shared.k_full.index(next_stage), next_phase, pred=more)


@gluon.jit
def consume(
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
    """Attention of 64 query rows of every tile of this program.

    Tiles are a pipeline too: the last product of one runs beside the first scores of the next, and what is left
    of a tile then, normalising and storing, delays nothing that is in flight but this warpgroup's next scores.

    With ``WIDE_STEPS`` a step is of two listed blocks of 64 keys, and waits, votes and products begun come half as
    often. A step with a partial block, or with one block alone, is masked.

    With ``MEANS`` a tile begins with the means of what its query block leaves out.
    """
    # Rows of 128 bytes: the halves of a buffer lie one behind the other.
    gl.static_assert(not (MEANS and (BLOCK_K != 64 or WIDE_STEPS or QUANTIZED or HAS_BITS or HAS_KEY_MASK)))
    gl.static_assert(not WIDE_STEPS or (BLOCK_K == 64 and HEAD_DIM == 64 and not QUANTIZED))
    STEP_K: gl.constexpr = 2 * BLOCK_K if WIDE_STEPS else BLOCK_K
    dtype: gl.constexpr = shared.o_smem.dtype
    K_INSTR: gl.constexpr = 32 if QUANTIZED else 16
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, STEP_K, K_INSTR]
    )
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 32 if FP8 else 16]
    )
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=4 if FP8 else 2)
    QUERIES: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=S_LAYOUT, k_width=4 if QUANTIZED else 2)
    # What is hidden in a partial block is read at places that are read before: with 64 keys a block ahead, so that the
    # second load need not wait for the first. With 128 keys that takes registers which there are not.
    ASK_AHEAD: gl.constexpr = STEP_K == 64
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    MAX_OFFSET: gl.constexpr = FP8_MAX_OFFSET if FP8 else 0.0
    THRESHOLD: gl.constexpr = FP8_RESCALE_THRESHOLD if FP8 else RESCALE_THRESHOLD
    SCALES: gl.constexpr = 4 if THREAD_SCALES else 1
    # Of the block at hand; and of the one before, whose product is still to be issued.
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    prev_stage = gl.to_tensor(STAGES - 1)
    turn = gl.to_tensor(0)
    tile, work_idx = initial_work_tile(scheduler, PERMUTED and not QUANTIZED)
    start = gl.zeros([64, STEP_K], gl.int32 if QUANTIZED else gl.float32, layout=S_LAYOUT)
    LANES: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, by_thread(start).type.layout))
    if TAKE_TURNS and WG == 1:
        warp_scheduler_barrier_arrive(WG, sizes.num_tiles)
    # The tile whose last product is still to be issued, none before the first; and whether it had more blocks. A
    # tile's first product ignores the sums of the tile before: writing zeros in their place would cost registers.
    prev_tile = gl.to_tensor(-1)
    prev_use_acc = prev_tile >= 0
    acc = gl.zeros([64, HEAD_DIM], gl.float32, layout=O_LAYOUT)
    row_max = gl.full([64, 4], ROW_MAX_INIT, gl.float32, layout=LANES)
    row_sum = gl.zeros([64, 4], gl.float32, layout=LANES)
    acc_scale = gl.zeros([64, 4], gl.float32, layout=LANES)
    rescale = gl.zeros([64, 4], gl.int32, layout=LANES)
    p = gl.zeros([64, STEP_K], gl.float32, layout=S_LAYOUT)
    if FP8:
        p_operand = pack_p_fp8(p)
    # Of scores that are in base 2 already.
    one = gl.full([64, 1], 1.0, gl.float32, layout=LANES)
    list_row, count, full = tile_header(tile, sizes, lists, means, False, MEANS)
    while tile < sizes.num_tiles:
        head = (tile // sizes.nq).to(gl.int64)
        at = lists.index_ptr + list_row.to(gl.int64) * sizes.list_length
        bits_at = lists.bit_rows_ptr + list_row.to(gl.int64) * sizes.list_length
        perm_at = lists.perm_ptr + head * tensors.perm_head_stride
        # By slots, as the rows are, where they are.
        key_mask_at = lists.key_mask_ptr + head * tensors.perm_head_stride
        first_slot = tile_block(tile, sizes.nq) * 128 + WG * 64
        if MEANS:
            # Lists go on behind blocks of means.
            at -= means.steps
            bits_at -= means.steps
            kept_at, kept_words = kept_row(head, tile_block(tile, sizes.nq), means)
        if count > 0:
            steps, full_steps = (count + 1) // 2 if WIDE_STEPS else count, full // 2 if WIDE_STEPS else full
            buffer = (turn % 2) * 2
            q_tile = shared.q_smem.index(buffer + WG)
            if QUANTIZED:
                row_scale = query_scales(head, first_slot, sizes, tensors, LANES)
                scales_at = key_scales_at(head, sizes, tensors, BLOCK_K, THREAD_SCALES, LANES)
                key_scale = gl.load(scales_at + gl.load(at) * SCALES)
                following = gl.load(at + 1, mask=count > 1, other=0)
            else:
                row_scale = gl.full([64, 1], tensors.softmax_scale_log2, gl.float32, layout=LANES)
                key_scale = gl.to_tensor(1.0)
            mbarrier.wait(shared.q_full.index(buffer + WG), (turn // 2) & 1)
            if KEEP_Q:
                queries = q_tile.load(QUERIES)
            else:
                queries = q_tile

            # First scores of this tile, and the last product of the one before. Before the first tile that product
            # reads whatever is there, and nobody reads it.
            has_prev = prev_tile >= 0
            next_stage, next_phase = advance_stage(stage, phase, STAGES)
            mbarrier.wait(shared.k_full.index(stage), phase)
            if not FP8:
                p_operand = gl.convert_layout(p.to(dtype), OPERAND)
            qk_token = warpgroup_mma(
                queries, shared.k_smem.index(stage).permute([1, 0]), start, use_acc=False, is_async=True
            )
            if not FP8:
                acc = rescale_o(acc, acc_scale, rescale)
            prev_acc_scale = acc_scale
            pv_token = pv_gemm(p_operand, shared.v_smem.index(prev_stage), acc, prev_use_acc, FP8, OPERAND)
            # The next tile is asked for while the scores are being made.
            next_tile = get_current_work(scheduler, work_idx)
            next_row, next_count, next_full = tile_header(next_tile, sizes, lists, means, False, MEANS)
            qk = warpgroup_mma_wait(1, deps=[qk_token])
            consumer_release_k(stage, tensors.kv_len, STAGES)
            first_scores = qk.to(gl.float32)
            if MEANS:
                kept, kept_too = kept_of_step(gl.to_tensor(0), kept_at, kept_words, MEANS)
                first_scores = mean_scores(
                    first_scores, gl.to_tensor(0), kept, kept_too, tensors.softmax_scale_log2, means, MEANS
                )
            elif full_steps == 0:
                if WIDE_STEPS:
                    first_scores = mask_two_blocks(
                        first_scores,
                        gl.to_tensor(0),
                        count,
                        full,
                        at,
                        bits_at,
                        lists.bits_ptr,
                        key_mask_at,
                        tensors.kv_len,
                        WG,
                        BLOCK_K,
                        HAS_BITS,
                        HAS_KEY_MASK,
                    )
                else:
                    first_scores = apply_mask(
                        first_scores,
                        gl.load(at),
                        gl.load(bits_at),
                        lists.bits_ptr,
                        key_mask_at,
                        tensors.kv_len,
                        WG,
                        BLOCK_K,
                        S_LAYOUT,
                        HAS_BITS,
                        HAS_KEY_MASK,
                    )
            prev_row_max, prev_row_sum = row_max, row_sum
            row_max = gl.full([64, 4], ROW_MAX_INIT, gl.float32, layout=LANES)
            row_sum = gl.zeros([64, 4], gl.float32, layout=LANES)
            score_scale = one if MEANS else row_scale * key_scale
            block_max = block_row_max(first_scores, score_scale)
            row_max, acc_scale, rescale = update_row_max(block_max, row_max, THRESHOLD)
            p, row_sum = scale_apply_exp2(first_scores, row_max, acc_scale, row_sum, score_scale, MAX_OFFSET)
            if FP8:
                acc_scale = gl.zeros([64, 4], gl.float32, layout=LANES)
            consumer_wait(shared, stage, phase, next_stage, next_phase, steps > 1)
            if FP8:
                pv = warpgroup_mma_wait(0, deps=[pv_token])
                acc = rescale_and_add_o(acc, prev_acc_scale, pv)
                p_operand = pack_p_fp8(p)
            else:
                acc, p_operand = warpgroup_mma_wait(0, deps=[pv_token, p_operand])
            consumer_release_v(stage, STAGES)
            prev_stage, stage, phase = stage, next_stage, next_phase
            if has_prev:
                epilogue(
                    acc,
                    prev_row_max,
                    prev_row_sum,
                    prev_tile,
                    turn - 1,
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
                )
            if FP8:
                # What is left of the last tile is multiplied by 0 next; NaN and inf would survive that.
                acc = gl.where(gl.abs(acc) < float("inf"), acc, 0.0)
            prev_tile = tile
            prev_use_acc = steps > 1
            turn += 1

            # Means, full blocks, and partial ones.
            for kind in gl.static_range(0 if MEANS else 1, 3):
                if kind == 0:
                    begin, end = 1, means.steps
                elif kind == 1:
                    begin, end = means.steps if MEANS else 1, full_steps
                else:
                    begin, end = gl.maximum(full_steps, 1), steps
                if kind == 2 and ASK_AHEAD:
                    block = gl.load(at + begin, mask=begin < end, other=0)
                    bit_row = gl.load(bits_at + begin, mask=begin < end, other=0)
                for entry in range(begin, end):
                    if QUANTIZED:
                        # Two dependent loads, each one block ahead of its use.
                        key_scale = gl.load(scales_at + following * SCALES)
                        following = gl.load(at + entry + 1, mask=entry + 1 < count, other=0)
                    next_stage, next_phase = advance_stage(stage, phase, STAGES)
                    if not FP8:
                        # Only now, while the scores are being made; and float32 is carried without repacking.
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
                    qk = warpgroup_mma_wait(1, deps=[qk_token])
                    consumer_release_k(stage, tensors.kv_len, STAGES)
                    scores = qk
                    if kind == 0:
                        scores = mean_scores(qk, entry, first, second, tensors.softmax_scale_log2, means, MEANS)
                    elif kind == 2 and WIDE_STEPS:
                        scores = mask_two_blocks(
                            qk,
                            2 * entry,
                            count,
                            full,
                            at,
                            bits_at,
                            lists.bits_ptr,
                            key_mask_at,
                            tensors.kv_len,
                            WG,
                            BLOCK_K,
                            HAS_BITS,
                            HAS_KEY_MASK,
                        )
                    elif kind == 2:
                        if not ASK_AHEAD:
                            block = gl.load(at + entry)
                            bit_row = gl.load(bits_at + entry)
                        scores = apply_mask(
                            qk.to(gl.float32),
                            block,
                            bit_row,
                            lists.bits_ptr,
                            key_mask_at,
                            tensors.kv_len,
                            WG,
                            BLOCK_K,
                            S_LAYOUT,
                            HAS_BITS,
                            HAS_KEY_MASK,
                        )
                        if ASK_AHEAD:
                            block = gl.load(at + entry + 1, mask=entry + 1 < end, other=0)
                            bit_row = gl.load(bits_at + entry + 1, mask=entry + 1 < end, other=0)
                    score_scale = one if kind == 0 else row_scale * key_scale
                    block_max = block_row_max(scores, score_scale)
                    row_max, acc_scale, rescale = update_row_max(block_max, row_max, THRESHOLD)
                    if TAKE_TURNS:
                        # Now: the product that is left keeps the matrix units busy until the other consumer's scores
                        # begin; before that those would slow it down.
                        warp_scheduler_barrier_arrive(WG, sizes.num_tiles)
                    p, row_sum = scale_apply_exp2(scores, row_max, acc_scale, row_sum, score_scale, MAX_OFFSET)
                    # Here, before the product: the waits' branches keep the assembler from moving the wait for the
                    # product up, in front of the exponentials it shall overlap.
                    consumer_wait(shared, stage, phase, next_stage, next_phase, entry + 1 < steps)
                    if FP8:
                        # The wait takes no 8-bit operand; the assembler keeps its registers until here.
                        pv = warpgroup_mma_wait(0, deps=[pv_token])
                        acc = rescale_and_add_o(acc, prev_acc_scale, pv)
                    else:
                        acc, p_operand = warpgroup_mma_wait(0, deps=[pv_token, p_operand])
                    consumer_release_v(stage, STAGES)
                    prev_stage, stage, phase = stage, next_stage, next_phase
                    if FP8:
                        # The product takes the registers that P in float32 would be carried in.
                        p_operand = pack_p_fp8(p)
        else:
            # Nothing to read: zeros, and a log-sum-exp of -inf.
            next_tile = get_current_work(scheduler, work_idx)
            next_row, next_count, next_full = tile_header(next_tile, sizes, lists, means, False, MEANS)
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
        tile, list_row, count, full = next_tile, next_row, next_count, next_full
        work_idx += 1

    if prev_tile >= 0:
        if not FP8:
            acc = rescale_o(acc, acc_scale, rescale)
            p_operand = gl.convert_layout(p.to(dtype), OPERAND)
        pv_token = pv_gemm(p_operand, shared.v_smem.index(prev_stage), acc, prev_use_acc, FP8, OPERAND)
        pv = warpgroup_mma_wait(0, deps=[pv_token])
        if FP8:
            acc = rescale_and_add_o(acc, acc_scale, pv)
        else:
            acc = pv
        consumer_release_v(stage, STAGES)
        epilogue(
            acc,
            row_max,
            row_sum,
            prev_tile,
            turn - 1,
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
        )
    if TAKE_TURNS and WG == 0:
        # What the other one passed last.
        warp_scheduler_barrier_sync(WG)
