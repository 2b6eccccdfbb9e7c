"""Device code of block-sparse attention on Hopper, in Gluon: TMA, asynchronous WGMMA, specialised warps.

One producer warp streams the listed key and value blocks into shared memory. Two consumer warpgroups hold
64 query rows each; while one is in its softmax the other keeps the matrix units busy, and inside a
warpgroup the scores of block ``n + 1`` and the weighted values of block ``n`` are in flight during the
softmax (FlashAttention-3, arXiv 2407.08608). A program stays on its multiprocessor and takes query blocks
in turn, so that loads for the next one start before the last one is written.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .triton_forward import SIZES

LN_2_ = gl.constexpr(0.6931471805599453)


@gluon.jit
def _tile(tile, nq, heads, mask_head_stride, list_length, counts_ptr, fulls_ptr):
    """Query block, head, list offset, count and number of full blocks of a tile."""
    head = tile // nq
    query_block = tile % nq
    mask_row = head * mask_head_stride + query_block
    count = gl.load(counts_ptr + mask_row)
    full = gl.load(fulls_ptr + mask_row)
    return query_block, head, mask_row.to(gl.int64) * list_length, count, full


@gluon.jit
def _produce(
    q_desc,
    k_desc,
    v_desc,
    shared,
    counts_ptr,
    fulls_ptr,
    index_ptr,
    nq,
    heads,
    num_tiles,
    mask_head_stride,
    list_length,
    BLOCK_K: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    PERMUTED: gl.constexpr,
):
    """Stream Q (unless gathered by the consumers), K and V; V runs one block behind K, as it is used."""
    q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty = shared
    step = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        query_block, head, at, count, _full = _tile(
            tile, nq, heads, mask_head_stride, list_length, counts_ptr, fulls_ptr
        )
        column = head * HEAD_DIM
        if count > 0:
            if not PERMUTED:
                for half in gl.static_range(2):
                    mbarrier.wait(q_empty.index(half), (turn & 1) ^ 1)
                    mbarrier.expect(q_full.index(half), q_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(
                        q_desc,
                        [query_block * 128 + half * 64, column],
                        q_full.index(half),
                        q_smem.index(half),
                    )
            turn += 1
            block = gl.load(index_ptr + at)
            for entry in range(0, count):
                stage = step % STAGES
                phase = ((step // STAGES) & 1) ^ 1
                mbarrier.wait(k_empty.index(stage), phase)
                mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    k_desc, [block * BLOCK_K, column], k_full.index(stage), k_smem.index(stage)
                )
                mbarrier.wait(v_empty.index(stage), phase)
                mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    v_desc, [block * BLOCK_K, column], v_full.index(stage), v_smem.index(stage)
                )
                block = gl.load(index_ptr + at + entry + 1, mask=entry + 1 < count, other=0)
                step += 1


@gluon.jit
def _hide(
    scores,
    block,
    bit_row,
    bits_ptr,
    key_mask_ptr,
    rows_ptr,
    kv_len,
    HALF: gl.constexpr,
    BLOCK_K: gl.constexpr,
    LAYOUT: gl.constexpr,
    PERMUTED: gl.constexpr,
    HAS_BITS: gl.constexpr,
    HAS_KEY_MASK: gl.constexpr,
):
    """Scores of a partial block with ``-inf`` in place of every key that a query does not see."""
    offs_n = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, LAYOUT))
    slot = block * BLOCK_K + offs_n
    inside = slot < kv_len
    if HAS_KEY_MASK:
        key_row = slot
        if PERMUTED:
            key_row = gl.load(rows_ptr + slot, mask=inside, other=0)
        inside = inside & (gl.load(key_mask_ptr + key_row, mask=inside, other=0) != 0)
    scores = gl.where(inside[None, :], scores, float("-inf"))
    if HAS_BITS:
        words_per_row: gl.constexpr = BLOCK_K // 32
        offs_m = HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
        base = bits_ptr + gl.maximum(bit_row, 0).to(gl.int64) * (128 * words_per_row)
        words = gl.load(base + offs_m[:, None] * words_per_row + (offs_n // 32)[None, :])
        seen = (((words >> (offs_n % 32)[None, :]) & 1) != 0) | (bit_row < 0)
        scores = gl.where(seen, scores, float("-inf"))
    return scores


@gluon.jit
def _softmax(scores, peak, total, scale_log2, dtype: gl.constexpr, OPERAND: gl.constexpr):
    """Weights of a block as the left operand of the next product, and the rescaled row state."""
    new_peak = gl.maximum(peak, gl.max(scores, 1) * scale_log2)
    # A row that has seen nothing keeps peak -inf; 0 in its place avoids inf - inf.
    base = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = gl.exp2(scores * scale_log2 - base[:, None])
    shrink = gl.exp2(peak - base)
    total = total * shrink + gl.sum(weights, 1)
    return gl.convert_layout(weights.to(dtype), OPERAND), new_peak, total, shrink


@gluon.jit
def _consume(
    shared,
    q_ptr,
    out_ptr,
    lse_ptr,
    lists,
    HALF: gl.constexpr,
    BLOCK_K: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    PERMUTED: gl.constexpr,
    HAS_BITS: gl.constexpr,
    HAS_KEY_MASK: gl.constexpr,
):
    (
        counts_ptr,
        fulls_ptr,
        index_ptr,
        bit_rows_ptr,
        bits_ptr,
        rows_ptr,
        key_mask_ptr,
        stride_qs,
        stride_qh,
        stride_os,
        stride_oh,
        rows_head_stride,
        nq,
        heads,
        num_tiles,
        mask_head_stride,
        list_length,
        q_len,
        kv_len,
        scale_log2,
    ) = lists
    q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty = shared
    dtype: gl.constexpr = q_smem.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_K, 16]
    )
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16]
    )
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    step = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    q_tile = q_smem.index(HALF)
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        query_block, head, at, count, full = _tile(
            tile, nq, heads, mask_head_stride, list_length, counts_ptr, fulls_ptr
        )
        first_slot = query_block * 128 + HALF * 64
        rows_at = rows_ptr + head.to(gl.int64) * rows_head_stride
        acc = gl.zeros([64, HEAD_DIM], gl.float32, layout=O_LAYOUT)
        peak = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S_LAYOUT))
        total = gl.zeros([64], gl.float32, layout=gl.SliceLayout(1, S_LAYOUT))
        blank = gl.zeros([64, BLOCK_K], gl.float32, layout=S_LAYOUT)
        if count > 0:
            if PERMUTED:
                slot = first_slot + gl.arange(0, 64, layout=gl.SliceLayout(1, LOAD))
                columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LOAD))
                row = gl.load(rows_at + slot, mask=slot < q_len, other=0).to(gl.int64)
                q_at = q_ptr + head.to(gl.int64) * stride_qh
                q_rows = gl.load(
                    q_at + row[:, None] * stride_qs + columns[None, :],
                    mask=(slot < q_len)[:, None],
                    other=0.0,
                )
                q_tile.store(q_rows)
                fence_async_shared()
            else:
                mbarrier.wait(q_full.index(HALF), turn & 1)
            turn += 1

            stage = step % STAGES
            mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
            token = warpgroup_mma(q_tile, k_smem.index(stage).permute([1, 0]), blank, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[token])
            mbarrier.arrive(k_empty.index(stage), count=1)
            if full == 0:
                scores = _hide(
                    scores,
                    gl.load(index_ptr + at),
                    gl.load(bit_rows_ptr + at),
                    bits_ptr,
                    key_mask_ptr,
                    rows_at,
                    kv_len,
                    HALF,
                    BLOCK_K,
                    S_LAYOUT,
                    PERMUTED,
                    HAS_BITS,
                    HAS_KEY_MASK,
                )
            weights, peak, total, shrink = _softmax(scores, peak, total, scale_log2, dtype, P_LAYOUT)
            step += 1

            for partial in gl.static_range(2):
                begin = gl.maximum(full, 1) if partial else 1
                end = count if partial else full
                for entry in range(begin, end):
                    stage = step % STAGES
                    last = (step - 1) % STAGES
                    mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
                    token = warpgroup_mma(
                        q_tile, k_smem.index(stage).permute([1, 0]), blank, use_acc=False, is_async=True
                    )
                    mbarrier.wait(v_full.index(last), ((step - 1) // STAGES) & 1)
                    acc_token = warpgroup_mma(weights, v_smem.index(last), acc, is_async=True)
                    scores = warpgroup_mma_wait(1, deps=[token])
                    mbarrier.arrive(k_empty.index(stage), count=1)
                    if partial:
                        scores = _hide(
                            scores,
                            gl.load(index_ptr + at + entry),
                            gl.load(bit_rows_ptr + at + entry),
                            bits_ptr,
                            key_mask_ptr,
                            rows_at,
                            kv_len,
                            HALF,
                            BLOCK_K,
                            S_LAYOUT,
                            PERMUTED,
                            HAS_BITS,
                            HAS_KEY_MASK,
                        )
                    next_weights, peak, total, shrink = _softmax(scores, peak, total, scale_log2, dtype, P_LAYOUT)
                    acc, weights = warpgroup_mma_wait(0, deps=[acc_token, weights])
                    mbarrier.arrive(v_empty.index(last), count=1)
                    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, O_LAYOUT))[:, None]
                    weights = next_weights
                    step += 1
            if not PERMUTED:
                # The last scores are done: the producer may overwrite Q while the tail is computed.
                mbarrier.arrive(q_empty.index(HALF), count=1)
            last = (step - 1) % STAGES
            mbarrier.wait(v_full.index(last), ((step - 1) // STAGES) & 1)
            acc_token = warpgroup_mma(weights, v_smem.index(last), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc_token])
            mbarrier.arrive(v_empty.index(last), count=1)

        nothing = total == 0.0
        safe = gl.where(nothing, 1.0, total)
        lse = gl.where(nothing, float("-inf"), (peak + gl.log2(safe)) * LN_2_)
        slot = first_slot + gl.arange(0, 64, layout=gl.SliceLayout(1, S_LAYOUT))
        row = slot
        if PERMUTED:
            row = gl.load(rows_at + slot, mask=slot < q_len, other=0)
        gl.store(lse_ptr + head.to(gl.int64) * q_len + row, lse, mask=slot < q_len)
        acc = acc * gl.convert_layout(1.0 / safe, gl.SliceLayout(1, O_LAYOUT))[:, None]
        slot = first_slot + gl.arange(0, 64, layout=gl.SliceLayout(1, O_LAYOUT))
        row = slot
        if PERMUTED:
            row = gl.load(rows_at + slot, mask=slot < q_len, other=0)
        columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, O_LAYOUT))
        out_at = out_ptr + head.to(gl.int64) * stride_oh + row.to(gl.int64)[:, None] * stride_os
        gl.store(out_at + columns[None, :], acc.to(dtype), mask=(slot < q_len)[:, None])


@gluon.jit(do_not_specialize=(*SIZES, "nq", "num_tiles"))
def hopper_fwd_kernel(
    q_desc,
    k_desc,
    v_desc,
    q_ptr,
    out_ptr,
    lse_ptr,
    counts_ptr,
    fulls_ptr,
    index_ptr,
    bit_rows_ptr,
    bits_ptr,
    rows_ptr,
    key_mask_ptr,
    stride_qs,
    stride_qh,
    stride_os,
    stride_oh,
    rows_head_stride,
    nq,
    heads,
    num_tiles,
    mask_head_stride,
    list_length,
    q_len,
    kv_len,
    scale_log2,
    BLOCK_K: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    PERMUTED: gl.constexpr,
    HAS_BITS: gl.constexpr,
    HAS_KEY_MASK: gl.constexpr,
):
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2, 64, HEAD_DIM], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_K, HEAD_DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BLOCK_K, HEAD_DIM], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for half in gl.static_range(2):
        mbarrier.init(q_full.index(half), count=1)
        mbarrier.init(q_empty.index(half), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        # Both consumers read every block.
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()

    shared = (q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty)
    lists = (
        counts_ptr,
        fulls_ptr,
        index_ptr,
        bit_rows_ptr,
        bits_ptr,
        rows_ptr,
        key_mask_ptr,
        stride_qs,
        stride_qh,
        stride_os,
        stride_oh,
        rows_head_stride,
        nq,
        heads,
        num_tiles,
        mask_head_stride,
        list_length,
        q_len,
        kv_len,
        scale_log2,
    )
    first: gl.constexpr = 0
    second: gl.constexpr = 1
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    shared,
                    q_ptr,
                    out_ptr,
                    lse_ptr,
                    lists,
                    first,
                    BLOCK_K,
                    HEAD_DIM,
                    STAGES,
                    PERMUTED,
                    HAS_BITS,
                    HAS_KEY_MASK,
                ),
            ),
            (
                _consume,
                (
                    shared,
                    q_ptr,
                    out_ptr,
                    lse_ptr,
                    lists,
                    second,
                    BLOCK_K,
                    HEAD_DIM,
                    STAGES,
                    PERMUTED,
                    HAS_BITS,
                    HAS_KEY_MASK,
                ),
            ),
            (
                _produce,
                (
                    q_desc,
                    k_desc,
                    v_desc,
                    shared,
                    counts_ptr,
                    fulls_ptr,
                    index_ptr,
                    nq,
                    heads,
                    num_tiles,
                    mask_head_stride,
                    list_length,
                    BLOCK_K,
                    HEAD_DIM,
                    STAGES,
                    PERMUTED,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )
