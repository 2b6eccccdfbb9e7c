"""Dynamic, persistent tile scheduler of the Hopper kernel: which query block of which head a program takes next.

A tile is 128 query rows of one head: a query block with its list, or two of 64 rows with a list each, a pair. Block
lists have rows of unequal length, so programs take tiles from a counter in global memory. The producer takes them, one
ahead, and passes them on through shared memory, two at a time.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def tile_block(tile, nq):
    """Query block of a tile. A head's last ones come first: they may hold text, which reads every block."""
    return nq - 1 - tile % nq


@gluon.jit
def tile_header(tile, sizes, lists, means, PAIRED: gl.constexpr, MEANS: gl.constexpr):
    """Row of the lists, count and number of full blocks of a tile; past the last one there is nothing to read.

    Of a pair of lists it is the first one's row, the steps of both, and nothing. With ``MEANS`` blocks of them come
    first, counted as full ones.
    """
    row = (tile // sizes.nq) * sizes.mask_head_stride + tile_block(tile, sizes.nq)
    inside = tile < sizes.num_tiles
    if PAIRED:
        first, second, _first_full, _second_full, shared = pair_header(row, inside, lists, means, MEANS)
        return row * 2, first + second - shared, gl.to_tensor(0)
    else:
        count = gl.load(lists.counts_ptr + row, mask=inside, other=0)
        full = gl.load(lists.fulls_ptr + row, mask=inside, other=0)
        if MEANS:
            return row, count + means.steps, full + means.steps
        else:
            return row, count, full


@gluon.jit
def pair_header(pair, inside, lists, means, MEANS: gl.constexpr):
    """Counts of a pair's two lists, their numbers of full blocks, and how many they begin with that both hold.

    With ``MEANS`` both begin with all of them, and numbers of full blocks count those too.
    """
    at = lists.counts_ptr + pair * 5
    header = (
        gl.load(at, mask=inside, other=0),
        gl.load(at + 1, mask=inside, other=0),
        gl.load(at + 2, mask=inside, other=0),
        gl.load(at + 3, mask=inside, other=0),
        gl.load(at + 4, mask=inside, other=0),
    )
    if MEANS:
        more = means.steps
        return header[0] + more, header[1] + more, header[2] + more, header[3] + more, header[4] + more
    else:
        return header


@gluon.jit
def pair_entry(step, first, second, shared, list_length):
    """Where the ``step``-th block of a pair's stream stands, counted from the first list's begin.

    The stream has the shared blocks, then one of each list in turn, then what is left of the longer list.
    """
    short = gl.minimum(first, second)
    alternate = step - shared
    left = step >= 2 * short - shared
    in_second = gl.where(left, gl.where(second > first, 1, 0), alternate & 1)
    entry = gl.where(left, step - short + shared, shared + alternate // 2)
    common = step < shared
    return gl.where(common, step, in_second * list_length + entry)


@gluon.jit
def initial_work_tile(scheduler, PERMUTE_KV: gl.constexpr):
    """The first tile of this program, and the ``work_idx`` of the next, for all warps but the producer.

    It is the program's own number; but where programs wait for each other's tiles, none may be held by a program that
    does not run yet.
    """
    if PERMUTE_KV:
        return get_current_work(scheduler, gl.to_tensor(0)), gl.to_tensor(1)
    else:
        return gl.program_id(0), gl.to_tensor(0)


@gluon.jit
def advance_to_next_work(scheduler, work_idx, PERMUTE_KV: gl.constexpr):
    """The producer takes a tile for this program, the ``work_idx``-th, and tells the other warps."""
    slot = work_idx % 2
    tile = gl.atomic_add(scheduler.counter_ptr, 1, sem="relaxed")
    if not PERMUTE_KV:
        tile += gl.num_programs(0)
    mbarrier.wait(scheduler.work_empty.index(slot), ((work_idx // 2) & 1) ^ 1)
    scheduler.work.index(slot).store(
        gl.full([1], tile, gl.int32, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    )
    mbarrier.arrive(scheduler.work_full.index(slot), count=1)
    return tile


@gluon.jit
def get_current_work(scheduler, work_idx):
    """The ``work_idx``-th tile that the producer took, for the other warps."""
    slot = work_idx % 2
    mbarrier.wait(scheduler.work_full.index(slot), (work_idx // 2) & 1)
    tile = gl.max(scheduler.work.index(slot).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)
    mbarrier.arrive(scheduler.work_empty.index(slot), count=1)
    return tile
