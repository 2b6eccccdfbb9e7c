"""Arithmetic of the Hopper kernel: a warpgroup's 64 query rows against the blocks that the producer loads."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .named_barriers import await_turn, give_back_keys, give_back_values, pass_turn
from .producer import claimed_tile, first_tile, tile_block, tile_header
from .softmax import (
    FP8_LIFT,
    FP8_SLACK,
    LOWEST,
    SLACK,
    add_product,
    by_thread,
    hide_keys,
    largest_scores,
    pack_fp8,
    raise_reference,
    shrink_sums,
    unpack_fp8,
    weigh_scores,
)
from .writer import write_tile


@gluon.jit
def weigh_values(weights, values, acc, use_acc, FP8: gl.constexpr, OPERAND: gl.constexpr):
    """Issue the product of a block's weights and values: onto ``acc``, in 8 bits apart from it.

    Sums of e4m3 products keep too few bits for many blocks; the caller adds each in float32.
    """
    if FP8:
        LAYOUT: gl.constexpr = acc.type.layout
        fresh = gl.zeros([acc.shape[0], acc.shape[1]], gl.float32, layout=LAYOUT)
        words = unpack_fp8(weights, OPERAND)
        token = warpgroup_mma(words, values.permute([1, 0]), fresh, use_acc=False, is_async=True)
    else:
        token = warpgroup_mma(weights, values, acc, use_acc=use_acc, is_async=True)
    return token


@gluon.jit
def stage_after(stage, phase, STAGES: gl.constexpr):
    """Buffer of the next step, and the phase of its barriers. Counted on: a step's remainder would take longer."""
    wraps = stage == STAGES - 1
    return gl.where(wraps, 0, stage + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def await_next(shared, stage, phase, next_stage, next_phase, more):
    """Wait for a step's values, and if there are ``more``, for the next one's keys, which are loaded after them."""
    mbarrier.wait(shared.v_full.index(stage), phase)
    mbarrier.wait(shared.k_full.index(next_stage), next_phase, pred=more)


@gluon.jit
def consume(
    shared,
    queue,
    lists,
    sizes,
    tensors,
    HALF: gl.constexpr,
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
):
    """Attention of 64 query rows of every tile of this program.

    Tiles are a pipeline too: the last product of one runs beside the first scores of the next, and what is left
    of a tile then, normalising and storing, delays nothing that is in flight but this warpgroup's next scores.
    """
    dtype: gl.constexpr = shared.o_smem.dtype
    K_INSTR: gl.constexpr = 32 if QUANTIZED else 16
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_K, K_INSTR]
    )
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 32 if FP8 else 16]
    )
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=4 if FP8 else 2)
    QUERIES: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=S_LAYOUT, k_width=4 if QUANTIZED else 2)
    # With 64 keys a product reads as many bytes of q as of k, and shared memory could not keep up.
    KEEP_Q: gl.constexpr = BLOCK_K == 64
    # What is hidden in a partial block is read at places that are read before: with 64 keys a block ahead, so that the
    # second load need not wait for the first. With 128 keys that takes registers which there are not.
    ASK_AHEAD: gl.constexpr = BLOCK_K == 64
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    LIFT: gl.constexpr = FP8_LIFT if FP8 else 0.0
    MAY_EXCEED: gl.constexpr = FP8_SLACK if FP8 else SLACK
    SCALES: gl.constexpr = 4 if THREAD_SCALES else 1
    # Of the block at hand; and of the one before, whose product is still to be issued.
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    last = gl.to_tensor(STAGES - 1)
    turn = gl.to_tensor(0)
    tile, place = first_tile(queue, PERMUTED and not QUANTIZED)
    start = gl.zeros([64, BLOCK_K], gl.int32 if QUANTIZED else gl.float32, layout=S_LAYOUT)
    LANES: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, by_thread(start).type.layout))
    if TAKE_TURNS and HALF == 1:
        pass_turn(HALF, sizes.num_tiles)
    # The tile whose last product is still to be issued, none before the first; and whether it had more blocks. A
    # tile's first product ignores the sums of the tile before: writing zeros in their place would cost registers.
    open_tile = gl.to_tensor(-1)
    open_more = open_tile >= 0
    acc = gl.zeros([64, HEAD_DIM], gl.float32, layout=O_LAYOUT)
    reference = gl.full([64, 4], LOWEST, gl.float32, layout=LANES)
    total = gl.zeros([64, 4], gl.float32, layout=LANES)
    shrink = gl.zeros([64, 4], gl.float32, layout=LANES)
    raised = gl.zeros([64, 4], gl.int32, layout=LANES)
    likely = gl.zeros([64, BLOCK_K], gl.float32, layout=S_LAYOUT)
    if FP8:
        weights = pack_fp8(likely)
    list_row, count, full = tile_header(tile, sizes, lists)
    while tile < sizes.num_tiles:
        head = (tile // sizes.nq).to(gl.int64)
        at = lists.index_ptr + list_row.to(gl.int64) * sizes.list_length
        bits_at = lists.bit_rows_ptr + list_row.to(gl.int64) * sizes.list_length
        rows_at = lists.perm_ptr + head * tensors.perm_head_stride
        # By slots, as the rows are, where they are.
        key_mask_at = lists.key_mask_ptr + head * tensors.perm_head_stride
        first_slot = tile_block(tile, sizes.nq) * 128 + HALF * 64
        if count > 0:
            buffer = (turn % 2) * 2
            q_tile = shared.q_smem.index(buffer + HALF)
            if QUANTIZED:
                slot = first_slot + gl.arange(0, 64, layout=gl.SliceLayout(1, LANES))[:, None]
                row_scale = gl.load(tensors.q_scale_ptr + head * sizes.q_rows + slot) * tensors.softmax_scale_log2
                scales_at = tensors.k_scale_ptr + head * (sizes.k_rows // BLOCK_K) * SCALES
                if THREAD_SCALES:
                    scales_at += gl.arange(0, 4, layout=gl.SliceLayout(0, LANES))[None, :]
                key_scale = gl.load(scales_at + gl.load(at) * SCALES)
                following = gl.load(at + 1, mask=count > 1, other=0)
            else:
                row_scale = gl.full([64, 1], tensors.softmax_scale_log2, gl.float32, layout=LANES)
                key_scale = gl.to_tensor(1.0)
            mbarrier.wait(shared.q_full.index(buffer + HALF), (turn // 2) & 1)
            if KEEP_Q:
                queries = q_tile.load(QUERIES)
            else:
                queries = q_tile

            # First scores of this tile, and the last product of the one before. Before the first tile that product
            # reads whatever is there, and nobody reads it.
            opened = open_tile >= 0
            next_stage, next_phase = stage_after(stage, phase, STAGES)
            mbarrier.wait(shared.k_full.index(stage), phase)
            if not FP8:
                weights = gl.convert_layout(likely.to(dtype), OPERAND)
            token = warpgroup_mma(
                queries, shared.k_smem.index(stage).permute([1, 0]), start, use_acc=False, is_async=True
            )
            if not FP8:
                acc = shrink_sums(acc, shrink, raised)
            earlier = shrink
            acc_token = weigh_values(weights, shared.v_smem.index(last), acc, open_more, FP8, OPERAND)
            # The next tile is asked for while the scores are being made.
            next_tile = claimed_tile(queue, place)
            next_row, next_count, next_full = tile_header(next_tile, sizes, lists)
            products = warpgroup_mma_wait(1, deps=[token])
            give_back_keys(stage, tensors.kv_len, STAGES)
            first_scores = products.to(gl.float32)
            if full == 0:
                first_scores = hide_keys(
                    first_scores,
                    gl.load(at),
                    gl.load(bits_at),
                    lists.bits_ptr,
                    key_mask_at,
                    tensors.kv_len,
                    HALF,
                    BLOCK_K,
                    S_LAYOUT,
                    HAS_BITS,
                    HAS_KEY_MASK,
                )
            open_reference, open_total = reference, total
            reference = gl.full([64, 4], LOWEST, gl.float32, layout=LANES)
            total = gl.zeros([64, 4], gl.float32, layout=LANES)
            factor = row_scale * key_scale
            largest = largest_scores(first_scores, factor)
            reference, shrink, raised = raise_reference(largest, reference, MAY_EXCEED)
            likely, total = weigh_scores(first_scores, reference, shrink, total, factor, LIFT)
            if FP8:
                shrink = gl.zeros([64, 4], gl.float32, layout=LANES)
            await_next(shared, stage, phase, next_stage, next_phase, count > 1)
            if FP8:
                product = warpgroup_mma_wait(0, deps=[acc_token])
                acc = add_product(acc, earlier, product)
                weights = pack_fp8(likely)
            else:
                acc, weights = warpgroup_mma_wait(0, deps=[acc_token, weights])
            give_back_values(stage, STAGES)
            last, stage, phase = stage, next_stage, next_phase
            if opened:
                write_tile(
                    acc,
                    open_reference,
                    open_total,
                    open_tile,
                    turn - 1,
                    shared,
                    sizes,
                    tensors,
                    HALF,
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
            open_tile = tile
            open_more = count > 1
            turn += 1

            for partial in gl.static_range(2):
                begin = gl.maximum(full, 1) if partial else 1
                end = count if partial else full
                if partial and ASK_AHEAD:
                    block = gl.load(at + begin, mask=begin < end, other=0)
                    bit_row = gl.load(bits_at + begin, mask=begin < end, other=0)
                for entry in range(begin, end):
                    if QUANTIZED:
                        # Two dependent loads, each one block ahead of its use.
                        key_scale = gl.load(scales_at + following * SCALES)
                        following = gl.load(at + entry + 1, mask=entry + 1 < count, other=0)
                    next_stage, next_phase = stage_after(stage, phase, STAGES)
                    if not FP8:
                        # Only now, while the scores are being made; and float32 is carried without repacking.
                        weights = gl.convert_layout(likely.to(dtype), OPERAND)
                    if TAKE_TURNS:
                        await_turn(HALF)
                    token = warpgroup_mma(
                        queries, shared.k_smem.index(stage).permute([1, 0]), start, use_acc=False, is_async=True
                    )
                    if not FP8:
                        # While the scores are being made.
                        acc = shrink_sums(acc, shrink, raised)
                    earlier = shrink
                    acc_token = weigh_values(weights, shared.v_smem.index(last), acc, entry > 1, FP8, OPERAND)
                    products = warpgroup_mma_wait(1, deps=[token])
                    give_back_keys(stage, tensors.kv_len, STAGES)
                    scores = products
                    if partial:
                        if not ASK_AHEAD:
                            block = gl.load(at + entry)
                            bit_row = gl.load(bits_at + entry)
                        scores = hide_keys(
                            products.to(gl.float32),
                            block,
                            bit_row,
                            lists.bits_ptr,
                            key_mask_at,
                            tensors.kv_len,
                            HALF,
                            BLOCK_K,
                            S_LAYOUT,
                            HAS_BITS,
                            HAS_KEY_MASK,
                        )
                        if ASK_AHEAD:
                            block = gl.load(at + entry + 1, mask=entry + 1 < end, other=0)
                            bit_row = gl.load(bits_at + entry + 1, mask=entry + 1 < end, other=0)
                    factor = row_scale * key_scale
                    largest = largest_scores(scores, factor)
                    reference, shrink, raised = raise_reference(largest, reference, MAY_EXCEED)
                    if TAKE_TURNS:
                        # Now: the product that is left keeps the matrix units busy until the other consumer's scores
                        # begin; before that those would slow it down.
                        pass_turn(HALF, sizes.num_tiles)
                    likely, total = weigh_scores(scores, reference, shrink, total, factor, LIFT)
                    # Here, before the product: the waits' branches keep the assembler from moving the wait for the
                    # product up, in front of the exponentials it shall overlap.
                    await_next(shared, stage, phase, next_stage, next_phase, entry + 1 < count)
                    if FP8:
                        # The wait takes no 8-bit operand; the assembler keeps its registers until here.
                        product = warpgroup_mma_wait(0, deps=[acc_token])
                        acc = add_product(acc, earlier, product)
                    else:
                        acc, weights = warpgroup_mma_wait(0, deps=[acc_token, weights])
                    give_back_values(stage, STAGES)
                    last, stage, phase = stage, next_stage, next_phase
                    if FP8:
                        # The product takes the registers that float32 weights would be carried in.
                        weights = pack_fp8(likely)
        else:
            # Nothing to read: zeros, and a log-sum-exp of -inf.
            next_tile = claimed_tile(queue, place)
            next_row, next_count, next_full = tile_header(next_tile, sizes, lists)
            blank_slot = first_slot + gl.arange(0, 64, layout=gl.SliceLayout(1, O_LAYOUT))
            blank_live = blank_slot < tensors.q_len
            blank_row = blank_slot
            if PERMUTED:
                blank_row = gl.load(rows_at + blank_slot, mask=blank_live, other=0)
            columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, O_LAYOUT))
            out_at = tensors.out_ptr + head * tensors.stride_oh
            blank_at = out_at + blank_row.to(gl.int64)[:, None] * tensors.stride_os + columns[None, :]
            gl.store(blank_at, gl.zeros([64, HEAD_DIM], dtype, layout=O_LAYOUT), mask=blank_live[:, None])
            unseen = gl.full([64], float("-inf"), gl.float32, layout=O_ROW)
            gl.store(tensors.lse_ptr + head * tensors.q_len + blank_row, unseen, mask=blank_live)
        tile, list_row, count, full = next_tile, next_row, next_count, next_full
        place += 1

    if open_tile >= 0:
        if not FP8:
            acc = shrink_sums(acc, shrink, raised)
            weights = gl.convert_layout(likely.to(dtype), OPERAND)
        acc_token = weigh_values(weights, shared.v_smem.index(last), acc, open_more, FP8, OPERAND)
        product = warpgroup_mma_wait(0, deps=[acc_token])
        if FP8:
            acc = add_product(acc, shrink, product)
        else:
            acc = product
        give_back_values(stage, STAGES)
        write_tile(
            acc,
            reference,
            total,
            open_tile,
            turn - 1,
            shared,
            sizes,
            tensors,
            HALF,
            HEAD_DIM,
            PERMUTED,
            QUANTIZED,
            FP8,
            ROW,
            O_LAYOUT,
        )
    if TAKE_TURNS and HALF == 0:
        # What the other one passed last.
        await_turn(HALF)
