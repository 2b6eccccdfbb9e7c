"""Loads of the Hopper kernel: one warp that streams listed blocks into shared memory through TMA."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .counters import add_to, await_count, has_reached
from .mover import blocks_of_head
from .named_barriers import await_keys, await_rest, await_values


@gluon.jit
def tile_block(tile, nq):
    """Query block of a tile. A head's last ones come first: they may hold text, which reads every block."""
    return nq - 1 - tile % nq


@gluon.jit
def tile_header(tile, sizes, lists):
    """Row of the lists, count and number of full blocks of a tile; zeros past the last one."""
    row = (tile // sizes.nq) * sizes.mask_head_stride + tile_block(tile, sizes.nq)
    inside = tile < sizes.num_tiles
    return (
        row,
        gl.load(lists.counts_ptr + row, mask=inside, other=0),
        gl.load(lists.fulls_ptr + row, mask=inside, other=0),
    )


@gluon.jit
def first_tile(queue, MOVED: gl.constexpr):
    """The first tile of this program, and the place of the next in the queue, for the warps that do not claim.

    It is the program's own number; but where programs wait for each other's tiles, none may be held by a program that
    does not run yet.
    """
    if MOVED:
        return claimed_tile(queue, gl.to_tensor(0)), gl.to_tensor(1)
    else:
        return gl.program_id(0), gl.to_tensor(0)


@gluon.jit
def claim_tile(queue, place, MOVED: gl.constexpr):
    """Take the next tile for this program and tell its consumers: the ``place``-th that it takes."""
    slot = place % 2
    tile = gl.atomic_add(queue.counter_ptr, 1, sem="relaxed")
    if not MOVED:
        tile += gl.num_programs(0)
    mbarrier.wait(queue.work_empty.index(slot), ((place // 2) & 1) ^ 1)
    queue.work.index(slot).store(
        gl.full([1], tile, gl.int32, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    )
    mbarrier.arrive(queue.work_full.index(slot), count=1)
    return tile


@gluon.jit
def claimed_tile(queue, place):
    """The ``place``-th tile that the producer took, for the other warps."""
    slot = place % 2
    mbarrier.wait(queue.work_full.index(slot), (place // 2) & 1)
    tile = gl.max(queue.work.index(slot).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)
    mbarrier.arrive(queue.work_empty.index(slot), count=1)
    return tile


@gluon.jit
def report_loaded(spent, tiles, shared, steps, STAGES: gl.constexpr):
    """Tell the movers that so many tiles of a head need nothing more of it.

    ``steps`` blocks were asked for until then. All must have arrived, and of those that are still under way none
    overtakes another for sure.
    """
    if tiles > 0:
        for back in gl.static_range(1, STAGES):
            step = gl.maximum(steps - back, 0)
            mbarrier.wait(shared.k_full.index(step % STAGES), (step // STAGES) & 1, pred=steps >= back)
            mbarrier.wait(shared.v_full.index(step % STAGES), (step // STAGES) & 1, pred=steps >= back)
        add_to(spent, tiles)


@gluon.jit
def count_loaded(head, last_head, tiles, spent_ptr, shared, steps, STAGES: gl.constexpr):
    """Tiles of ``head`` so far, with this one; those of the head before are reported when it changes."""
    if head != last_head:
        report_loaded(spent_ptr + last_head, tiles, shared, steps, STAGES)
        tiles = gl.to_tensor(0)
    return tiles + 1


@gluon.jit
def produce(
    descriptors,
    shared,
    queue,
    lists,
    sizes,
    tensors,
    moves,
    BLOCK_K: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    MOVED: gl.constexpr,
    FP8: gl.constexpr,
):
    """Stream Q (unless its rows are permuted), K and V of every tile of this program, and take its tiles."""
    step = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    if MOVED:
        place = gl.to_tensor(1)
        tile = claim_tile(queue, gl.to_tensor(0), MOVED)
        # The head whose tiles are being loaded, and how many of them have been.
        last_head = gl.to_tensor(-1)
        loaded = gl.to_tensor(0)
        # Whether the keys of the next tile's head are known to be in order.
        ready = gl.to_tensor(0)
        pieces = blocks_of_head(tensors.kv_len, BLOCK_K)
    else:
        place = gl.to_tensor(0)
        tile = gl.program_id(0)
    row, count, _full = tile_header(tile, sizes, lists)
    block = gl.load(lists.index_ptr + row.to(gl.int64) * sizes.list_length)
    while tile < sizes.num_tiles:
        next_tile, next_row, next_count, next_block = tile, row, count, block
        at = lists.index_ptr + row.to(gl.int64) * sizes.list_length
        head = tile // sizes.nq
        column = head % sizes.ring * sizes.head_cols
        if MOVED:
            if head - last_head >= sizes.ring:
                # The movers may need to know before they can go on. Else it has time.
                report_loaded(moves.empty_ptr + last_head, loaded, shared, step, STAGES)
                last_head = head
                loaded = gl.to_tensor(0)
            if ready == 0:
                await_count(moves.full_ptr + head, pieces)
        if count > 0:
            for entry in range(0, count):
                following = gl.load(at + entry + 1, mask=entry + 1 < count, other=0)
                stage = step % STAGES
                if not MOVED:  # noqa: SIM102 - a compile-time condition around a run-time one
                    if entry == 0:
                        # Ahead of the keys, and into the buffer of the last tile but one: it waits for nobody.
                        for half in gl.static_range(2):
                            buffer = (turn % 2) * 2 + half
                            mbarrier.wait(shared.q_empty.index(buffer), ((turn // 2) & 1) ^ 1)
                            mbarrier.expect(shared.q_full.index(buffer), descriptors.q.block_type.nbytes)
                            tma.async_copy_global_to_shared(
                                descriptors.q,
                                [
                                    head * sizes.q_rows + tile_block(tile, sizes.nq) * 128 + half * 64,
                                    head * sizes.head_cols,
                                ],
                                shared.q_full.index(buffer),
                                shared.q_smem.index(buffer),
                            )
                await_keys(step, STAGES)
                mbarrier.expect(shared.k_full.index(stage), descriptors.k.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    descriptors.k,
                    [head * sizes.k_rows + block * BLOCK_K, column],
                    shared.k_full.index(stage),
                    shared.k_smem.index(stage),
                )
                if entry == 0:
                    # Here, so that the consumers find the answer when they begin the tile.
                    next_tile = claim_tile(queue, place, MOVED)
                    next_row, next_count, _full = tile_header(next_tile, sizes, lists)
                    next_block = gl.load(
                        lists.index_ptr + next_row.to(gl.int64) * sizes.list_length,
                        mask=next_tile < sizes.num_tiles,
                        other=0,
                    )
                    if MOVED:
                        loaded = count_loaded(head, last_head, loaded, moves.empty_ptr, shared, step, STAGES)
                        last_head = head
                        next_head = gl.minimum(next_tile, sizes.num_tiles - 1) // sizes.nq
                        ready = gl.to_tensor(1)
                        if next_head != head:
                            ready = has_reached(moves.full_ptr + next_head, pieces)
                await_values(step, STAGES)
                mbarrier.expect(shared.v_full.index(stage), descriptors.v.block_type.nbytes)
                if FP8:
                    tma.async_copy_global_to_shared(
                        descriptors.v,
                        [head * HEAD_DIM, block * BLOCK_K],
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
                block = following
                step += 1
            turn += 1
        else:
            next_tile = claim_tile(queue, place, MOVED)
            next_row, next_count, _full = tile_header(next_tile, sizes, lists)
            next_block = gl.load(
                lists.index_ptr + next_row.to(gl.int64) * sizes.list_length, mask=next_tile < sizes.num_tiles, other=0
            )
            if MOVED:
                loaded = count_loaded(head, last_head, loaded, moves.empty_ptr, shared, step, STAGES)
                last_head = head
                ready = gl.to_tensor(0)
        place += 1
        tile, row, count, block = next_tile, next_row, next_count, next_block
    if MOVED:
        report_loaded(moves.empty_ptr + last_head, loaded, shared, step, STAGES)
    await_rest(step, STAGES)
