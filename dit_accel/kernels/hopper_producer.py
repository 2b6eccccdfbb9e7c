"""Loads of the Hopper kernel: one warp that streams listed blocks into shared memory through TMA."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def tile_header(tile, num_tiles, nq, heads, mask_batch_stride, mask_head_stride, counts_ptr, fulls_ptr):
    """Row of the lists, count and number of full blocks of a tile; zeros past the last one."""
    plane = tile // nq
    row = (plane // heads) * mask_batch_stride + (plane % heads) * mask_head_stride + tile % nq
    inside = tile < num_tiles
    return (
        row,
        gl.load(counts_ptr + row, mask=inside, other=0),
        gl.load(fulls_ptr + row, mask=inside, other=0),
    )


@gluon.jit
def produce(
    descriptors,
    shared,
    lists,
    sizes,
    BLOCK_K: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr,
    GATHER_Q: gl.constexpr,
    FP8: gl.constexpr,
):
    """Stream Q (unless the consumers gather it), K and V of every tile of this program."""
    q_desc, k_desc, v_desc, _out_desc = descriptors
    q_smem, k_smem, v_smem, _o_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, _order = shared
    counts_ptr, fulls_ptr, index_ptr, _bit_rows_ptr, _bits_ptr, _rows_ptr, _key_mask_ptr = lists
    nq, heads, num_tiles, mask_batch_stride, mask_head_stride, list_length, q_rows, k_rows, plane_cols = sizes
    step = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    programs = gl.num_programs(0)
    row, count, _full = tile_header(
        gl.program_id(0), num_tiles, nq, heads, mask_batch_stride, mask_head_stride, counts_ptr, fulls_ptr
    )
    first = gl.load(index_ptr + row.to(gl.int64) * list_length)
    for tile in range(gl.program_id(0), num_tiles, programs):
        next_row, next_count, _full = tile_header(
            tile + programs, num_tiles, nq, heads, mask_batch_stride, mask_head_stride, counts_ptr, fulls_ptr
        )
        at = index_ptr + row.to(gl.int64) * list_length
        plane = tile // nq
        column = plane * plane_cols
        if count > 0:
            block = first
            for entry in range(0, count):
                following = gl.load(at + entry + 1, mask=entry + 1 < count, other=0)
                stage = step % STAGES
                phase = ((step // STAGES) & 1) ^ 1
                mbarrier.wait(k_empty.index(stage), phase)
                mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    k_desc,
                    [plane * k_rows + block * BLOCK_K, column],
                    k_full.index(stage),
                    k_smem.index(stage),
                )
                mbarrier.wait(v_empty.index(stage), phase)
                mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
                if FP8:
                    tma.async_copy_global_to_shared(
                        v_desc,
                        [plane * HEAD_DIM, block * BLOCK_K],
                        v_full.index(stage),
                        v_smem.index(stage),
                    )
                else:
                    tma.async_copy_global_to_shared(
                        v_desc,
                        [block * BLOCK_K, plane * HEAD_DIM],
                        v_full.index(stage),
                        v_smem.index(stage),
                    )
                if not GATHER_Q:  # noqa: SIM102 - a compile-time condition around a run-time one
                    if entry == 0:
                        # After the first block: its loads need not wait for the last tile's Q and output.
                        for half in gl.static_range(2):
                            buffer = (turn % Q_STAGES) * 2 + half
                            mbarrier.wait(q_empty.index(buffer), ((turn // Q_STAGES) & 1) ^ 1)
                            mbarrier.expect(q_full.index(buffer), q_desc.block_type.nbytes)
                            tma.async_copy_global_to_shared(
                                q_desc,
                                [plane * q_rows + (tile % nq) * 128 + half * 64, column],
                                q_full.index(buffer),
                                q_smem.index(buffer),
                            )
                block = following
                step += 1
            turn += 1
        row, count = next_row, next_count
        first = gl.load(index_ptr + row.to(gl.int64) * list_length, mask=tile + programs < num_tiles, other=0)
