"""A warp of the Hopper kernel that puts keys and values of a permuted call in order, some heads ahead.

TMA moves adjacent rows only. A copy made beforehand costs its time and the memory of all heads; gathering the rows of
every listed block reads each of them once a query block, and takes four warps. Here the rows of a head are moved once,
while the heads before are attended, into a ring of a few heads.

Programs on other multiprocessors read what this warp has written, and it writes over what they have read. Both are
counted in global memory, a head at a time: ``ready`` counts pieces that lie in the ring, ``spent`` query blocks that
have loaded all of their keys. Nobody waits for work that a program has not taken yet: pieces and query blocks are
both taken in order, by programs that run.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .counters import add_to, await_count
from .rows import row_addresses

MOVED_ROWS = gl.constexpr(64)  # of k, and as many of v: a piece
MOVED_CHUNK = gl.constexpr(4)  # rows on their way out at a time: the warp has few registers


@gluon.jit
def pieces_of_head(kv_len):
    return (kv_len + MOVED_ROWS - 1) // MOVED_ROWS


@gluon.jit
def rows_of_piece(piece, end, pieces, rows_ptr, rows_head_stride, kv_len):
    """Rows in memory of a piece's slots; 0 past the last one."""
    slot = piece % pieces * MOVED_ROWS + gl.arange(0, MOVED_ROWS, layout=gl.BlockedLayout([1], [32], [1], [0]))
    at = rows_ptr + (piece // pieces).to(gl.int64) * rows_head_stride + slot
    return gl.load(at, mask=(slot < kv_len) & (piece < end), other=0)


@gluon.jit
def move_heads(moves, lists, sizes, state, HEAD_DIM: gl.constexpr, MOVED: gl.constexpr):
    """Move the keys and values of all heads, together with the other programs, into the ring."""
    LANES: gl.constexpr = HEAD_DIM // 8  # that move a row, 16 bytes each
    CHUNKS: gl.constexpr = MOVED_ROWS // MOVED_CHUNK
    ROWS: gl.constexpr = MOVED_CHUNK * LANES // 32  # of a chunk, in a thread
    LAYOUT: gl.constexpr = gl.BlockedLayout([ROWS, 8], [32 // LANES, LANES], [1, 1], [1, 0])
    if MOVED:
        stage, places, counters, rings = moves
        pieces_ptr, ready_ptr, spent_ptr = counters
        nq, num_tiles, _mask_head_stride, _list_length, _q_rows, _k_rows, _plane_cols, ring = sizes
        keys, _queries, _results, _scales, rows_head_stride, _q_len, kv_len, _scale_log2 = state
        rows_ptr = lists[5]
        columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LAYOUT))
        pieces = pieces_of_head(kv_len)
        end = num_tiles // nq * pieces
        piece = gl.atomic_add(pieces_ptr, 1, sem="relaxed")
        rows = rows_of_piece(piece, end, pieces, rows_ptr, rows_head_stride, kv_len)
        # The head of the piece before, which is not counted yet: its stores end beside the next copies.
        moved = gl.to_tensor(-1)
        while piece < end:
            head = piece // pieces
            places.store(rows)
            for which in gl.static_range(2):
                base = keys[which] + head.to(gl.int64) * keys[4 + which]
                for chunk in gl.static_range(CHUNKS):
                    at = row_addresses(base, places, chunk, keys[2 + which], MOVED_CHUNK, HEAD_DIM, LAYOUT)
                    async_copy.async_copy_global_to_shared(stage.index(which * CHUNKS + chunk), at)
            async_copy.commit_group()
            following = gl.atomic_add(pieces_ptr, 1, sem="relaxed")
            rows = rows_of_piece(following, end, pieces, rows_ptr, rows_head_stride, kv_len)
            if moved >= 0:
                add_to(ready_ptr + moved, 1)
            async_copy.wait_group(0)
            if head >= ring:
                await_count(spent_ptr + head - ring, nq)
            for which in gl.static_range(2):
                slot = piece % pieces * MOVED_ROWS + gl.arange(0, MOVED_CHUNK, layout=gl.SliceLayout(1, LAYOUT))
                to = rings[which] + head % ring * HEAD_DIM
                to = to + (slot.to(gl.int64) * (ring * HEAD_DIM))[:, None] + columns[None, :]
                for chunk in range(CHUNKS):
                    aligned = gl.max_contiguous(gl.multiple_of(to, [16, 16]), [1, 8])
                    gl.store(aligned, stage.index(which * CHUNKS + chunk).load(LAYOUT), mask=(slot < kv_len)[:, None])
                    to += ring * (MOVED_CHUNK * HEAD_DIM)
                    slot += MOVED_CHUNK
            moved = head
            piece = following
        if moved >= 0:
            add_to(ready_ptr + moved, 1)
