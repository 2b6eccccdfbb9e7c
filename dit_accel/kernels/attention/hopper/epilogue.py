"""Epilogue of a tile in the Hopper kernel: O to the store warps, the log-sum-exp to global memory."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language import debug_barrier

from .softmax import FP8_MAX_OFFSET
from .tile_scheduler import tile_block

LN_2_ = gl.constexpr(0.6931471805599453)


@gluon.jit
def epilogue(
    acc,
    row_max,
    row_sum,
    tile,
    turn,
    shared,
    sizes,
    tensors,
    WG: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PERMUTED: gl.constexpr,
    QUANTIZED: gl.constexpr,
    FP8: gl.constexpr,
    ROW: gl.constexpr,
    O_LAYOUT: gl.constexpr,
    PAIRED: gl.constexpr = False,
):
    """Normalise a tile's 64 rows, store their log-sum-exp, and leave their output in shared memory."""
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    head = (tile // sizes.nq).to(gl.int64)
    buffer = (turn % 2) * 2 + WG
    if QUANTIZED:
        # The output before has left its buffer, and the rows of this tile are known.
        mbarrier.wait(shared.o_empty.index(WG), turn & 1)
    first_slot = tile_block(tile, sizes.nq) * 128 + WG * 64
    slot = first_slot + gl.arange(0, 64, layout=ROW)
    row_sum = gl.convert_layout(gl.sum(row_sum, 1), ROW)
    nothing = row_sum == 0.0
    safe = gl.where(nothing, 1.0, row_sum)
    lse = (gl.convert_layout(gl.max(row_max, 1), ROW) + gl.log2(safe) - (FP8_MAX_OFFSET if FP8 else 0.0)) * LN_2_
    row = slot
    if PERMUTED:
        row = shared.row_idx.index(buffer).load(ROW)
    if QUANTIZED:
        # Smoothing took scale * q . mean(k) from every logit of the row. A last pair may have one block of rows only.
        in_block = slot < sizes.q_rows if PAIRED else None
        shift = gl.load(tensors.q_shift_ptr + head * sizes.q_rows + slot, mask=in_block)
        lse += shift * (tensors.softmax_scale_log2 * LN_2_)
    lse = gl.where(nothing, float("-inf"), lse)
    gl.store(tensors.lse_ptr + head * tensors.q_len + row, lse, mask=slot < tensors.q_len)
    acc = acc * gl.convert_layout(1.0 / safe, O_ROW)[:, None]
    if FP8:
        columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, O_LAYOUT))
        acc = acc * gl.load(tensors.v_scale_ptr + head * HEAD_DIM + columns)[None, :]
    # Through shared memory the output leaves in whole lines; in half precision Q's buffer is free by now.
    to = WG if QUANTIZED else buffer
    shared.o_smem.index(to).store(acc.to(shared.o_smem.dtype))
    if not PERMUTED:
        fence_async_shared()
    mbarrier.arrive(shared.o_full.index(to), count=1)
    if QUANTIZED:
        mbarrier.arrive(shared.q_empty.index(buffer), count=1)
    # After an arrival Triton lets the warpgroup meet before the next product. Here, once; not in the loop over blocks.
    debug_barrier()
