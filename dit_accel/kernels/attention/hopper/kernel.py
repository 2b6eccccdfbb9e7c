"""Device code of block-sparse attention on Hopper, in Gluon: TMA, asynchronous WGMMA, specialised warps.

One producer warp streams the listed key and value blocks into shared memory; of permuted calls another one puts them in
order, some heads ahead.
Two consumer warpgroups hold 64 query rows each; they take turns at issuing products, so that one is in its softmax
while the other keeps the matrix units busy, and inside a warpgroup the scores of block ``n + 1`` and the weighted
values of block ``n`` are in flight during the softmax (FlashAttention-3, arXiv 2407.08608). A program stays on its
multiprocessor and takes query blocks in turn, so that loads for the next one start before the last one is
written. Two more warps take the outputs out and, of permuted calls, bring the queries in.

With ``QUANTIZED`` q and k are INT8 with scales (per query token; per key block or, with ``THREAD_SCALES``, for
the keys of a block that one thread holds); with ``FP8`` the values and weights are e4m3 and every block's product
is added in float32 (SageAttention 2, arXiv 2411.10958).

Weights are relative to a reference that is raised late, so that sums are seldom multiplied (FlashAttention-4).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..triton.forward import SIZES
from .arguments import BlockLists, Descriptors, PermuteState, SchedulerState, SharedStorage, Sizes, Tensors
from .carrier import CARRIERS, carry
from .consumer import consume
from .mover import move_heads
from .producer import produce


@gluon.jit(
    do_not_specialize=(*SIZES, "nq", "num_tiles", "q_rows", "k_rows", "plane_cols", "stride_oh", "ring"),
    # Heads and launches start anywhere in these.
    do_not_specialize_on_alignment=(
        "q_ptr",
        "k_ptr",
        "v_ptr",
        "out_ptr",
        "lse_ptr",
        "counts_ptr",
        "fulls_ptr",
        "index_ptr",
        "bit_rows_ptr",
        "rows_ptr",
        "counter_ptr",
    ),
)
def hopper_fwd_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    q_scale_ptr,
    k_scale_ptr,
    v_scale_ptr,
    q_shift_ptr,
    counts_ptr,
    fulls_ptr,
    index_ptr,
    bit_rows_ptr,
    bits_ptr,
    rows_ptr,
    key_mask_ptr,
    counter_ptr,
    stride_qs,
    stride_qh,
    stride_ks,
    stride_vs,
    stride_kh,
    stride_vh,
    stride_os,
    stride_oh,
    rows_head_stride,
    nq,
    num_tiles,
    mask_head_stride,
    list_length,
    q_rows,
    k_rows,
    plane_cols,
    ring,
    q_len,
    kv_len,
    scale_log2,
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
    """Query blocks of 128 rows of the heads of one batch entry.

    ``q_rows`` and ``k_rows`` are a head's rows in the tensors of q and k, ``plane_cols`` its columns.
    Half-precision k and v of a permuted call lie in a ring of ``ring`` heads, side by side, in which the kernel itself
    puts them; quantised ones are in order already.
    """
    MOVED: gl.constexpr = PERMUTED and not QUANTIZED
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [4, 64, HEAD_DIM], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_K, HEAD_DIM], k_desc.layout)
    V_ROWS: gl.constexpr = HEAD_DIM if FP8 else BLOCK_K
    V_COLS: gl.constexpr = BLOCK_K if FP8 else HEAD_DIM
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, V_ROWS, V_COLS], v_desc.layout)
    # Half-precision outputs leave through the buffers of their queries.
    o_smem = q_smem
    if QUANTIZED:
        o_smem = gl.allocate_shared_memory(out_desc.dtype, [2, 64, HEAD_DIM], out_desc.layout)
    OUT_BUFFERS: gl.constexpr = 2 if QUANTIZED else 4
    q_full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    o_full = gl.allocate_shared_memory(gl.int64, [OUT_BUFFERS, 1], mbarrier.MBarrierLayout())
    for buffer in gl.static_range(OUT_BUFFERS):
        mbarrier.init(o_full.index(buffer), count=1)
    # Barriers only where they are used: the compiler would lay scratch over a dead one, and its first state was seen to
    # be read there in place of what had been stored since.
    q_empty, o_ready = q_full, q_full
    if not MOVED:
        q_empty = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
        for buffer in gl.static_range(4):
            mbarrier.init(q_empty.index(buffer), count=1)
    if QUANTIZED:
        o_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for half in gl.static_range(2):
            mbarrier.init(o_ready.index(half), count=1)
    claims = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    places = claims
    if PERMUTED:
        # Of the two tiles under way: the rows of their slots.
        places = gl.allocate_shared_memory(gl.int32, [4, 64], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    moves = PermuteState(claims, claims, counter_ptr, counter_ptr, counter_ptr)
    if MOVED:
        stage = gl.allocate_shared_memory(k_desc.dtype, [BLOCK_K, HEAD_DIM], k_desc.layout)
        moved = gl.allocate_shared_memory(gl.int32, [2, BLOCK_K], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
        heads = num_tiles // nq
        moves = PermuteState(stage, moved, counter_ptr + 1, counter_ptr + 2, counter_ptr + 2 + heads)
    claim_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    claim_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for half in gl.static_range(2):
        mbarrier.init(claim_full.index(half), count=1)
        # Both consumers and the carriers read every claim.
        mbarrier.init(claim_empty.index(half), count=3)
    for buffer in gl.static_range(4):
        mbarrier.init(q_full.index(buffer), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
    fence_async_shared()

    descriptors = Descriptors(q_desc, k_desc, v_desc, out_desc)
    shared = SharedStorage(q_smem, k_smem, v_smem, o_smem, places, q_full, q_empty, k_full, v_full, o_full, o_ready)
    queue = SchedulerState(counter_ptr, claims, claim_full, claim_empty)
    lists = BlockLists(counts_ptr, fulls_ptr, index_ptr, bit_rows_ptr, bits_ptr, rows_ptr, key_mask_ptr)
    sizes = Sizes(nq, num_tiles, mask_head_stride, list_length, q_rows, k_rows, plane_cols, ring)
    tensors = Tensors(
        k_ptr=k_ptr,
        v_ptr=v_ptr,
        stride_ks=stride_ks,
        stride_vs=stride_vs,
        stride_kh=stride_kh,
        stride_vh=stride_vh,
        q_ptr=q_ptr,
        stride_qs=stride_qs,
        stride_qh=stride_qh,
        out_ptr=out_ptr,
        lse_ptr=lse_ptr,
        stride_os=stride_os,
        stride_oh=stride_oh,
        q_scale_ptr=q_scale_ptr,
        k_scale_ptr=k_scale_ptr,
        v_scale_ptr=v_scale_ptr,
        q_shift_ptr=q_shift_ptr,
        perm_head_stride=rows_head_stride,
        q_len=q_len,
        kv_len=kv_len,
        softmax_scale_log2=scale_log2,
    )
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    # Registers of a thread. The other warps fill a warpgroup. With 64 keys consumers leave some, and the carriers need
    # not keep theirs in memory.
    CONSUMER: gl.constexpr = 208 if MOVED and BLOCK_K == 64 else 240
    OTHER: gl.constexpr = 504 - 2 * CONSUMER
    gl.warp_specialize(
        [
            (
                consume,
                (
                    shared,
                    queue,
                    lists,
                    sizes,
                    tensors,
                    FIRST,
                    BLOCK_K,
                    HEAD_DIM,
                    STAGES,
                    PERMUTED,
                    HAS_BITS,
                    HAS_KEY_MASK,
                    TAKE_TURNS,
                    QUANTIZED,
                    FP8,
                    THREAD_SCALES,
                ),
            ),
            (
                consume,
                (
                    shared,
                    queue,
                    lists,
                    sizes,
                    tensors,
                    SECOND,
                    BLOCK_K,
                    HEAD_DIM,
                    STAGES,
                    PERMUTED,
                    HAS_BITS,
                    HAS_KEY_MASK,
                    TAKE_TURNS,
                    QUANTIZED,
                    FP8,
                    THREAD_SCALES,
                ),
            ),
            (
                produce,
                (
                    descriptors,
                    shared,
                    queue,
                    lists,
                    sizes,
                    tensors,
                    moves,
                    BLOCK_K,
                    HEAD_DIM,
                    STAGES,
                    MOVED,
                    FP8,
                ),
            ),
            (carry, (out_desc, shared, queue, lists, sizes, tensors, HEAD_DIM, PERMUTED, QUANTIZED)),
            (move_heads, (descriptors, moves, lists, sizes, tensors, BLOCK_K, HEAD_DIM, MOVED)),
        ],
        [4, 1, CARRIERS, 1],
        [CONSUMER, OTHER, OTHER, OTHER],
    )
