"""Loads of a permuted call in the Hopper kernel: four warps that gather listed key and value blocks row by row.

TMA moves adjacent rows only, and a permuted copy of keys and values costs their bytes twice more, in time and in
memory. Here every row comes by asynchronous 16-byte loads, straight from the model's tensors. With 128 keys a block
consumers leave no registers for these warps: there the copy stays (see ``forward``).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .named_barriers import await_keys, await_rest, await_values
from .producer import claim_tile, tile_header

GATHERERS = gl.constexpr(4)  # warps: two were not fast enough for the matrix units


@gluon.jit
def rows_of_block(rows_at, block, stride, kv_len, BLOCK_K: gl.constexpr, ROW: gl.constexpr):
    """Where the rows of a block's slots begin in memory.

    A slot past the last one gets the block's first row: its weight is 0, and a NaN times 0 reaches nobody who does not
    see that row anyway.
    """
    first = block * BLOCK_K
    place = gl.arange(0, BLOCK_K, layout=ROW)
    if first + BLOCK_K <= kv_len:
        rows = gl.load(rows_at + first + place)
    else:
        rows = gl.load(rows_at + first + gl.where(first + place < kv_len, place, 0))
    return rows * stride


@gluon.jit
def start_copy(base, rows, smem, full, HEAD_DIM: gl.constexpr, LAYOUT: gl.constexpr):
    """Start the copy of a block's rows; each thread arrives at ``full`` when its part is there.

    PTX asks for a proxy fence between such writes and what the matrix units read. There is none here: the arrival
    follows the write, as CUTLASS' main loop of asynchronous copies and warpgroup products relies on too; a fence for
    each block took 2 % of a call.
    """
    columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LAYOUT))
    at = (base + columns)[None, :] + rows[:, None]
    # Strides unknown to the compiler hide this from it; it would move 2 bytes at a time.
    at = gl.max_contiguous(gl.multiple_of(at, [16, 16]), [1, 8])
    async_copy.async_copy_global_to_shared(smem, at)
    async_copy.mbarrier_arrive(full, increment_count=False)


@gluon.jit
def gather_blocks(
    shared,
    queue,
    lists,
    sizes,
    state,
    BLOCK_K: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Stream K and V of every tile of this program, and take its tiles."""
    LANES: gl.constexpr = HEAD_DIM // 8  # that copy a row, 16 bytes each
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [GATHERERS, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    buffers, loads, _outputs = shared
    _q_smem, k_smem, v_smem, _o_smem, _places = buffers
    _q_full, _q_empty, k_full, v_full = loads
    counts_ptr, fulls_ptr, index_ptr, _bit_rows_ptr, _bits_ptr, rows_ptr, _key_mask_ptr = lists
    nq, num_tiles, mask_head_stride, list_length, _q_rows, _k_rows, _plane_cols = sizes
    keys, _queries, _results, _scales, rows_head_stride, _q_len, kv_len, _scale_log2 = state
    k_ptr, v_ptr, row_stride, k_head_stride, v_head_stride = keys
    step = gl.to_tensor(0)
    place = gl.to_tensor(0)
    tile = gl.program_id(0)
    row, count, _full = tile_header(tile, num_tiles, nq, mask_head_stride, counts_ptr, fulls_ptr)
    while tile < num_tiles:
        next_tile, next_row, next_count = tile, row, count
        at = index_ptr + row.to(gl.int64) * list_length
        head = (tile // nq).to(gl.int64)
        k_base, v_base = k_ptr + head * k_head_stride, v_ptr + head * v_head_stride
        rows_at = rows_ptr + head * rows_head_stride
        if count > 0:
            rows = rows_of_block(rows_at, gl.load(at), row_stride, kv_len, BLOCK_K, ROW)
            following = gl.load(at + 1, mask=count > 1, other=0)
            for entry in range(0, count):
                # Two dependent loads, each one block ahead of its use.
                next_rows = rows_of_block(rows_at, following, row_stride, kv_len, BLOCK_K, ROW)
                following = gl.load(at + entry + 2, mask=entry + 2 < count, other=0)
                stage = step % STAGES
                await_keys(step, STAGES, GATHERERS)
                start_copy(k_base, rows, k_smem.index(stage), k_full.index(stage), HEAD_DIM, LAYOUT)
                if entry == 0:
                    # Here, so that the consumers find the answer when they begin the tile.
                    next_tile = claim_tile(queue, place)
                    next_row, next_count, _full = tile_header(
                        next_tile, num_tiles, nq, mask_head_stride, counts_ptr, fulls_ptr
                    )
                await_values(step, STAGES, GATHERERS)
                start_copy(v_base, rows, v_smem.index(stage), v_full.index(stage), HEAD_DIM, LAYOUT)
                rows = next_rows
                step += 1
        else:
            next_tile = claim_tile(queue, place)
            next_row, next_count, _full = tile_header(next_tile, num_tiles, nq, mask_head_stride, counts_ptr, fulls_ptr)
        place += 1
        tile, row, count = next_tile, next_row, next_count
    await_rest(step, STAGES, GATHERERS)
