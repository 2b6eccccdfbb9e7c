"""End of a tile in the Hopper kernel: a warpgroup's output and log-sum-exp to global memory."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .hopper_producer import tile_block
from .hopper_softmax import FP8_LIFT

LN_2_ = gl.constexpr(0.6931471805599453)


@gluon.jit
def write_tile(
    acc,
    peak,
    total,
    tile,
    buffer,
    out_desc,
    shared,
    rows_ptr,
    sizes,
    state,
    HALF: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PERMUTED: gl.constexpr,
    QUANTIZED: gl.constexpr,
    FP8: gl.constexpr,
    ROW: gl.constexpr,
    O_LAYOUT: gl.constexpr,
):
    """Normalise and store the output and log-sum-exp of a tile's 64 rows, and give its query buffer back."""
    _q_smem, _k_smem, _v_smem, o_smem, _q_full, q_empty, _k_full, _k_empty, _v_full, _v_empty, _order = shared
    nq, heads, _num_tiles, _mask_batch_stride, _mask_head_stride, _list_length, q_rows, _k_rows, _plane_cols = sizes
    (
        _q_ptr,
        out_ptr,
        lse_ptr,
        _q_scale_ptr,
        _k_scale_ptr,
        v_scale_ptr,
        q_shift_ptr,
        _stride_qb,
        _stride_qs,
        _stride_qh,
        stride_ob,
        stride_os,
        stride_oh,
        rows_batch_stride,
        rows_head_stride,
        q_len,
        _kv_len,
        scale_log2,
    ) = state
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    plane = (tile // nq).to(gl.int64)
    batch, head = plane // heads, plane % heads
    rows_at = rows_ptr + batch * rows_batch_stride + head * rows_head_stride
    first_slot = tile_block(tile, nq) * 128 + HALF * 64
    slot = first_slot + gl.arange(0, 64, layout=ROW)
    total = gl.convert_layout(gl.sum(total, 1), ROW)
    nothing = total == 0.0
    safe = gl.where(nothing, 1.0, total)
    lse = (peak + gl.log2(safe) - (FP8_LIFT if FP8 else 0.0)) * LN_2_
    row = slot
    if PERMUTED:
        row = gl.load(rows_at + slot, mask=slot < q_len, other=0)
    if QUANTIZED:
        # Smoothing took scale * q . mean(k) from every logit of the row.
        lse += gl.load(q_shift_ptr + plane * q_rows + slot) * (scale_log2 * LN_2_)
    lse = gl.where(nothing, float("-inf"), lse)
    gl.store(lse_ptr + plane * q_len + row, lse, mask=slot < q_len)
    acc = acc * gl.convert_layout(1.0 / safe, O_ROW)[:, None]
    if FP8:
        columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, O_LAYOUT))
        acc = acc * gl.load(v_scale_ptr + plane * HEAD_DIM + columns)[None, :]
    # Through shared memory the output leaves in whole lines; in half precision Q's buffer is free by now.
    o_tile = o_smem.index(HALF if QUANTIZED else buffer + HALF)
    o_tile.store(acc.to(o_smem.dtype))
    if PERMUTED:
        copy_slot = first_slot + gl.arange(0, 64, layout=gl.SliceLayout(1, COPY))
        copy_columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, COPY))
        live = copy_slot < q_len
        copy_row = gl.load(rows_at + copy_slot, mask=live, other=0).to(gl.int64)
        out_at = out_ptr + batch * stride_ob + head * stride_oh
        whole = o_tile.load(COPY)
        copy_at = out_at + copy_row[:, None] * stride_os + copy_columns[None, :]
        copy_at = gl.max_contiguous(gl.multiple_of(copy_at, [16, 16]), [1, 8])
        gl.store(copy_at, whole, mask=live[:, None])
    else:
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [first_slot, (head * HEAD_DIM).to(gl.int32)], o_tile)
        tma.store_wait(pendings=0)
    if QUANTIZED or not PERMUTED:
        mbarrier.arrive(q_empty.index(buffer + HALF), count=1)
