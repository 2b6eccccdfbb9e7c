"""Loads of the Hopper kernel: one warp that streams listed blocks into shared memory through TMA."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .named_barriers import pair_acquire_v, pair_tail, producer_acquire_k, producer_acquire_v, producer_tail
from .permute import kv_blocks_of_head
from .semaphores import semaphore_add, semaphore_reached, semaphore_wait
from .tile_scheduler import advance_to_next_work, pair_entry, pair_header, tile_block, tile_header


@gluon.jit
def report_loaded(empty_at, tiles, shared, steps, STAGES: gl.constexpr):
    """Tell the permuting warps that so many tiles of a head need nothing more of it.

    ``steps`` blocks were asked for until then. All must have arrived, and of those that are still under way none
    overtakes another for sure.
    """
    if tiles > 0:
        for back in gl.static_range(1, STAGES):
            step = gl.maximum(steps - back, 0)
            mbarrier.wait(shared.k_full.index(step % STAGES), (step // STAGES) & 1, pred=steps >= back)
            mbarrier.wait(shared.v_full.index(step % STAGES), (step // STAGES) & 1, pred=steps >= back)
        semaphore_add(empty_at, tiles)


@gluon.jit
def count_loaded(head, last_head, tiles, empty_ptr, shared, steps, STAGES: gl.constexpr):
    """Tiles of ``head`` so far, with this one; those of the head before are reported when it changes."""
    if head != last_head:
        report_loaded(empty_ptr + last_head, tiles, shared, steps, STAGES)
        tiles = gl.to_tensor(0)
    return tiles + 1


@gluon.jit
def following_of(at, place, entry, count, means):
    """What the step after ``entry`` loads: the next block of means, or the block that is listed at ``place``."""
    listed = entry + 1 >= means.steps
    following = gl.load(at + place, mask=(entry + 1 < count) & listed, other=0)
    return gl.where(listed, following, entry + 1)


@gluon.jit
def load_k_or_means(descriptors, shared, sizes, means, head, block, stage, of_means, BLOCK_K: gl.constexpr):
    """A block of keys into its buffer, which is free, or one of mean keys."""
    if of_means:
        tma.async_copy_global_to_shared(
            descriptors.mean_k,
            [head * means.rows + block * BLOCK_K, head * means.cols],
            shared.k_full.index(stage),
            shared.k_smem.index(stage),
        )
    else:
        tma.async_copy_global_to_shared(
            descriptors.k,
            [head * sizes.k_rows + block * BLOCK_K, head % sizes.ring * sizes.head_cols],
            shared.k_full.index(stage),
            shared.k_smem.index(stage),
        )


@gluon.jit
def load_v(
    descriptors,
    shared,
    sizes,
    means,
    head,
    block,
    beside,
    stage,
    of_means,
    BLOCK_K: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    FP8: gl.constexpr,
    WIDE_STEPS: gl.constexpr,
    MEANS: gl.constexpr,
):
    """A block of values, two side by side, or one of mean values, into their buffer, which is free."""
    mbarrier.expect(shared.v_full.index(stage), descriptors.v.block_type.nbytes * (2 if WIDE_STEPS else 1))
    if WIDE_STEPS:
        column = head % sizes.ring * HEAD_DIM
        buffer = shared.v_smem.index(stage)
        tma.async_copy_global_to_shared(
            descriptors.v, [block * BLOCK_K, column], shared.v_full.index(stage), buffer.slice(0, BLOCK_K)
        )
        tma.async_copy_global_to_shared(
            descriptors.v, [beside * BLOCK_K, column], shared.v_full.index(stage), buffer.slice(BLOCK_K, BLOCK_K)
        )
    elif FP8:
        tma.async_copy_global_to_shared(
            descriptors.v,
            [head * HEAD_DIM, block * BLOCK_K],
            shared.v_full.index(stage),
            shared.v_smem.index(stage),
        )
    elif MEANS:
        if of_means:
            tma.async_copy_global_to_shared(
                descriptors.mean_v,
                [head * means.rows + block * BLOCK_K, head * means.cols],
                shared.v_full.index(stage),
                shared.v_smem.index(stage),
            )
        else:
            tma.async_copy_global_to_shared(
                descriptors.v,
                [block * BLOCK_K, head % sizes.ring * HEAD_DIM],
                shared.v_full.index(stage),
                shared.v_smem.index(stage),
            )
    else:
        tma.async_copy_global_to_shared(
            descriptors.v,
            [block * BLOCK_K, head % sizes.ring * HEAD_DIM],
            shared.v_full.index(stage),
            shared.v_smem.index(stage),
        )


@gluon.jit
def produce(
    descriptors,
    shared,
    scheduler,
    lists,
    sizes,
    tensors,
    means,
    permute,
    BLOCK_K: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    PERMUTE_KV: gl.constexpr,
    FP8: gl.constexpr,
    PAIRED: gl.constexpr,
    WIDE_STEPS: gl.constexpr,
    MEANS: gl.constexpr,
):
    """Stream Q (unless its rows are permuted), K and V of every tile of this program, and take its tiles.

    ``step`` counts blocks, ``turn`` tiles that read any: they give the buffers and the barriers' phases. Of a pair of
    lists the blocks come in the order of :func:`~.tile_scheduler.pair_entry`. With ``MEANS`` every list begins with
    blocks of them.
    """
    step = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    if PERMUTE_KV:
        work_idx = gl.to_tensor(1)
        tile = advance_to_next_work(scheduler, gl.to_tensor(0), PERMUTE_KV)
        # The head whose tiles are being loaded, and how many of them have been.
        last_head = gl.to_tensor(-1)
        loaded = gl.to_tensor(0)
        # Whether the keys of the next tile's head are known to be in order.
        kv_ready = gl.to_tensor(0)
        kv_blocks = kv_blocks_of_head(tensors.kv_len, BLOCK_K)
    else:
        work_idx = gl.to_tensor(0)
        tile = gl.program_id(0)
    if PAIRED:
        # Bit n: whether the lists alternated n steps ago.
        history = gl.to_tensor(0)
    row, count, _full = tile_header(tile, sizes, lists, means, PAIRED, MEANS)
    block = gl.load(lists.index_ptr + row.to(gl.int64) * sizes.list_length)
    while tile < sizes.num_tiles:
        next_tile, next_row, next_count, next_block = tile, row, count, block
        at = lists.index_ptr + row.to(gl.int64) * sizes.list_length
        if MEANS:
            # Lists go on behind blocks of means, whose numbers are those of their steps.
            at -= means.steps
        head = tile // sizes.nq
        column = head % sizes.ring * sizes.head_cols
        if PERMUTE_KV:
            if head - last_head >= sizes.ring:
                # The permuting warps may need to know before they can go on. Else it has time.
                report_loaded(permute.empty_ptr + last_head, loaded, shared, step, STAGES)
                last_head = head
                loaded = gl.to_tensor(0)
            if kv_ready == 0:
                semaphore_wait(permute.full_ptr + head, kv_blocks)
        if count > 0:
            if MEANS:
                block = gl.to_tensor(0)
            if PAIRED:
                first, second, _first_full, _second_full, both = pair_header(
                    row // 2, tile < sizes.num_tiles, lists, means, MEANS
                )
                short = gl.minimum(first, second)
                if not MEANS:
                    block = gl.load(at + pair_entry(0, first, second, both, sizes.list_length))
                # Numbers of their own, which no load reads: where this one was ``block`` the compiler took it for a
                # variable that the loop leaves alone, and every step loaded the first one's values.
                prev_block, prev_stage = gl.to_tensor(0), gl.to_tensor(0)
            steps = count
            if WIDE_STEPS:
                # Two blocks a step. A last one alone is loaded twice: weights of 0 need values that are finite.
                steps = (count + 1) // 2
                beside = gl.load(at + 1, mask=count > 1, other=block)
            for entry in range(0, steps):
                if PAIRED:
                    place = pair_entry(entry + 1, first, second, both, sizes.list_length)
                    if MEANS:
                        following = following_of(at, place, entry, count, means)
                    else:
                        following = gl.load(at + place, mask=entry + 1 < count, other=0)
                elif WIDE_STEPS:
                    following = gl.load(at + 2 * entry + 2, mask=2 * entry + 2 < count, other=0)
                    following_beside = gl.load(at + 2 * entry + 3, mask=2 * entry + 3 < count, other=following)
                elif MEANS:
                    following = following_of(at, entry + 1, entry, count, means)
                else:
                    following = gl.load(at + entry + 1, mask=entry + 1 < count, other=0)
                stage = step % STAGES
                if not PERMUTE_KV:  # noqa: SIM102 - a compile-time condition around a run-time one
                    if entry == 0:
                        # Ahead of the keys, and into the buffer of the last tile but one: it waits for nobody.
                        for wg in gl.static_range(2):
                            buffer = (turn % 2) * 2 + wg
                            mbarrier.wait(shared.q_empty.index(buffer), ((turn // 2) & 1) ^ 1)
                            mbarrier.expect(shared.q_full.index(buffer), descriptors.q.block_type.nbytes)
                            tma.async_copy_global_to_shared(
                                descriptors.q,
                                [
                                    head * sizes.q_rows + tile_block(tile, sizes.nq) * 128 + wg * 64,
                                    head * sizes.head_cols,
                                ],
                                shared.q_full.index(buffer),
                                shared.q_smem.index(buffer),
                            )
                producer_acquire_k(step, STAGES)
                mbarrier.expect(shared.k_full.index(stage), descriptors.k.block_type.nbytes * (2 if WIDE_STEPS else 1))
                if MEANS:
                    load_k_or_means(descriptors, shared, sizes, means, head, block, stage, entry < means.steps, BLOCK_K)
                else:
                    tma.async_copy_global_to_shared(
                        descriptors.k,
                        [head * sizes.k_rows + block * BLOCK_K, column],
                        shared.k_full.index(stage),
                        shared.k_smem.index(stage).slice(0, BLOCK_K) if WIDE_STEPS else shared.k_smem.index(stage),
                    )
                if WIDE_STEPS:
                    tma.async_copy_global_to_shared(
                        descriptors.k,
                        [head * sizes.k_rows + beside * BLOCK_K, column],
                        shared.k_full.index(stage),
                        shared.k_smem.index(stage).slice(BLOCK_K, BLOCK_K),
                    )
                if entry == 0:
                    # Here, so that the consumers find the answer when they begin the tile.
                    next_tile = advance_to_next_work(scheduler, work_idx, PERMUTE_KV)
                    next_row, next_count, _full = tile_header(next_tile, sizes, lists, means, PAIRED, MEANS)
                    next_block = gl.load(
                        lists.index_ptr + next_row.to(gl.int64) * sizes.list_length,
                        mask=next_tile < sizes.num_tiles,
                        other=0,
                    )
                    if PERMUTE_KV:
                        loaded = count_loaded(head, last_head, loaded, permute.empty_ptr, shared, step, STAGES)
                        last_head = head
                        next_head = gl.minimum(next_tile, sizes.num_tiles - 1) // sizes.nq
                        kv_ready = gl.to_tensor(1)
                        if next_head != head:
                            kv_ready = semaphore_reached(permute.full_ptr + next_head, kv_blocks)
                if PAIRED:
                    # After the next keys, which a consumer needs half a step earlier.
                    if entry > 0:
                        pair_acquire_v(step - 1, history, STAGES)
                        load_v(
                            descriptors,
                            shared,
                            sizes,
                            means,
                            head,
                            prev_block,
                            0,
                            prev_stage,
                            entry <= means.steps if MEANS else False,
                            BLOCK_K,
                            HEAD_DIM,
                            FP8,
                            False,
                            MEANS,
                        )
                    history = history * 2 + ((entry >= both) & (entry < 2 * short - both)).to(gl.int32)
                    prev_block, prev_stage = block, stage
                else:
                    producer_acquire_v(step, STAGES)
                    load_v(
                        descriptors,
                        shared,
                        sizes,
                        means,
                        head,
                        block,
                        beside if WIDE_STEPS else 0,
                        stage,
                        entry < means.steps if MEANS else False,
                        BLOCK_K,
                        HEAD_DIM,
                        FP8,
                        WIDE_STEPS,
                        MEANS,
                    )
                block = following
                if WIDE_STEPS:
                    beside = following_beside
                step += 1
            if PAIRED:
                # With the tile, whose blocks are counted as loaded before the next one's keys are waited for.
                pair_acquire_v(step - 1, history, STAGES)
                load_v(
                    descriptors,
                    shared,
                    sizes,
                    means,
                    head,
                    prev_block,
                    0,
                    prev_stage,
                    count <= means.steps if MEANS else False,
                    BLOCK_K,
                    HEAD_DIM,
                    FP8,
                    False,
                    MEANS,
                )
            turn += 1
        else:
            next_tile = advance_to_next_work(scheduler, work_idx, PERMUTE_KV)
            next_row, next_count, _full = tile_header(next_tile, sizes, lists, means, PAIRED, MEANS)
            next_block = gl.load(
                lists.index_ptr + next_row.to(gl.int64) * sizes.list_length, mask=next_tile < sizes.num_tiles, other=0
            )
            if PERMUTE_KV:
                loaded = count_loaded(head, last_head, loaded, permute.empty_ptr, shared, step, STAGES)
                last_head = head
                kv_ready = gl.to_tensor(0)
        work_idx += 1
        tile, row, count, block = next_tile, next_row, next_count, next_block
    if PERMUTE_KV:
        report_loaded(permute.empty_ptr + last_head, loaded, shared, step, STAGES)
    if PAIRED:
        pair_tail(step, history, STAGES)
    else:
        producer_tail(step, STAGES)
