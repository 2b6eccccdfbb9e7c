"""Device code of block-sparse attention on Hopper, in Gluon: TMA, asynchronous WGMMA, specialised warps.

It is FlashAttention-3's forward (arXiv 2407.08608) over lists of key blocks. The warps of a program:

    2 consumers   consumer.py   a warpgroup each, 64 query rows: S = QK^T, online softmax, O += PV; where query blocks
                                have 64 rows, pair_consumer.py, a list each
    1 producer    producer.py   streams the listed blocks of K and V (and Q) into shared memory, and takes tiles
    2 store warps store.py      take O out; in permuted calls they bring Q in
    1 permuter    permute.py    in permuted calls it puts K and V in order, some heads ahead

The consumers take turns at issuing products (ping-pong), so that one is in its softmax while the other keeps the matrix
units busy. Inside a consumer QK^T of block ``n + 1`` and PV of block ``n`` are in flight during the softmax. A program
is persistent: it takes query blocks from a queue, and loads for the next one start before the last one is written.

With ``QUANTIZED`` q and k are INT8 with scales: one for each query token, and one for each key block or, with
``THREAD_SCALES``, for those keys of a block that one thread holds. With ``FP8`` V and P are e4m3, and every block's
product is added in float32 (SageAttention 2, arXiv 2411.10958).

Glossary, by where a name is at home:

    tile            128 query rows of one head, the work of one step of the scheduler (tile_scheduler.py)
    pair            a tile of two query blocks of 64, each with a list of its own (pair_consumer.py)
    slot, row       a place in the permuted sequence; the place in memory of what stands there: perm[slot] = row
    full, partial   blocks that need no mask, first in a list; blocks that apply_mask masks (softmax.py)
    row_max, row_sum    m and l of the online softmax; row_max lags the true maximum by at most RESCALE_THRESHOLD
    acc_scale, rescale  what O and row_sum are multiplied by after row_max was raised, and whether that is to be done
    MAX_OFFSET      exponent added to P, so that e4m3 is used up to its largest number
    p, p_operand    P in float32, as softmax leaves it; P as left operand of PV
    prev_*          of the tile before, whose last PV is issued beside the first QK^T of the next
    stage, phase    buffer of a block of K and V, and the parity of its barriers
    *_full, *_empty barriers in shared memory: a buffer has been filled, may be filled
    named barriers  the same without a meeting of the warpgroup, and the consumers' turns (named_barriers.py)
    ring            the circular buffer in global memory of permuted K and V, a few heads long (permute.py)
    semaphores      counters in global memory, by which programs wait for each other at the ring (semaphores.py)
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ...common.launch import SIZES
from .arguments import BlockLists, Descriptors, Means, PermuteState, SchedulerState, SharedStorage, Sizes, Tensors
from .consumer import consume
from .pair_consumer import consume_pair
from .permute import permute_kv
from .producer import produce
from .store import STORE_WARPS, store_loop


@gluon.jit(
    do_not_specialize=(
        *SIZES,
        "perm_head_stride",
        "nq",
        "num_tiles",
        "q_rows",
        "k_rows",
        "head_cols",
        "stride_oh",
        "ring",
        "kept_head_stride",
        "kept_rows",
        "kept_words",
        "mean_steps",
        "whole_means",
        "mean_rows",
        "mean_cols",
    ),
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
        "perm_ptr",
        "counter_ptr",
        "kept_ptr",
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
    perm_ptr,
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
    perm_head_stride,
    nq,
    num_tiles,
    mask_head_stride,
    list_length,
    q_rows,
    k_rows,
    head_cols,
    ring,
    q_len,
    kv_len,
    softmax_scale_log2,
    mean_k_desc,
    mean_v_desc,
    kept_ptr,
    kept_head_stride,
    kept_rows,
    kept_words,
    mean_steps,
    whole_means,
    mean_rows,
    mean_cols,
    log2_tokens,
    log2_rest,
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
    PAIRED: gl.constexpr,
    WIDE_STEPS: gl.constexpr,
    KEEP_Q: gl.constexpr,
    MEANS: gl.constexpr,
):
    """Query blocks of 128 rows, or ``PAIRED`` ones of 64, of the heads of one batch entry.

    ``arguments.py`` says what the arguments are. With ``MEANS``, how many means a key block has, or 0, query blocks
    attend the means of what they leave out too: in half precision, with 64 keys a step, and without masks of tokens.

    Half-precision k and v of a permuted call lie in a circular buffer of ``ring`` heads, side by side, in which the
    kernel itself puts them. Quantised ones are in order already.
    """
    PERMUTE_KV: gl.constexpr = PERMUTED and not QUANTIZED
    STEP_K: gl.constexpr = 2 * BLOCK_K if WIDE_STEPS else BLOCK_K
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [4, 64, HEAD_DIM], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, STEP_K, HEAD_DIM], k_desc.layout)
    V_ROWS: gl.constexpr = HEAD_DIM if FP8 else STEP_K
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
    q_empty, o_empty = q_full, q_full
    if not PERMUTE_KV:
        q_empty = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
        for buffer in gl.static_range(4):
            mbarrier.init(q_empty.index(buffer), count=1)
    if QUANTIZED:
        o_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for wg in gl.static_range(2):
            mbarrier.init(o_empty.index(wg), count=1)
    work = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    row_idx = work
    if PERMUTED:
        # Of the two tiles under way: the rows of their slots.
        row_idx = gl.allocate_shared_memory(gl.int32, [4, 64], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    permute = PermuteState(work, work, counter_ptr, counter_ptr, counter_ptr)
    if PERMUTE_KV:
        kv_tile = gl.allocate_shared_memory(k_desc.dtype, [BLOCK_K, HEAD_DIM], k_desc.layout)
        kv_row_idx = gl.allocate_shared_memory(gl.int32, [2, BLOCK_K], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
        heads = num_tiles // nq
        permute = PermuteState(kv_tile, kv_row_idx, counter_ptr + 1, counter_ptr + 2, counter_ptr + 2 + heads)
    work_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    work_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for wg in gl.static_range(2):
        mbarrier.init(work_full.index(wg), count=1)
        # Both consumers and the store warps read every tile's number.
        mbarrier.init(work_empty.index(wg), count=3)
    for buffer in gl.static_range(4):
        mbarrier.init(q_full.index(buffer), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
    fence_async_shared()

    descriptors = Descriptors(q_desc, k_desc, v_desc, out_desc, mean_k_desc, mean_v_desc)
    shared = SharedStorage(q_smem, k_smem, v_smem, o_smem, row_idx, q_full, q_empty, k_full, v_full, o_full, o_empty)
    scheduler = SchedulerState(counter_ptr, work, work_full, work_empty)
    lists = BlockLists(counts_ptr, fulls_ptr, index_ptr, bit_rows_ptr, bits_ptr, perm_ptr, key_mask_ptr)
    sizes = Sizes(nq, num_tiles, mask_head_stride, list_length, q_rows, k_rows, head_cols, ring)
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
        perm_head_stride=perm_head_stride,
        q_len=q_len,
        kv_len=kv_len,
        softmax_scale_log2=softmax_scale_log2,
    )
    means = Means(
        kept_ptr,
        kept_head_stride,
        kept_rows,
        kept_words,
        mean_steps,
        whole_means,
        mean_rows,
        mean_cols,
        log2_tokens,
        log2_rest,
    )
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    # Registers of a thread. The other warps fill a warpgroup. With 64 keys consumers leave some, and neither the store
    # warps of a permuted call nor the producer of pairs need keep theirs in memory. FP8 products take registers
    # of their own beside the output's.
    IN_ORDER: gl.constexpr = (232 if FP8 else 224) if PAIRED else 240
    CONSUMER: gl.constexpr = 208 if PERMUTE_KV and STEP_K == 64 else IN_ORDER
    OTHER: gl.constexpr = 504 - 2 * CONSUMER
    gl.warp_specialize(
        [
            (
                consume_pair if PAIRED else consume,
                (
                    shared,
                    scheduler,
                    lists,
                    sizes,
                    tensors,
                    means,
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
                    WIDE_STEPS,
                    KEEP_Q,
                    MEANS,
                ),
            ),
            (
                consume_pair if PAIRED else consume,
                (
                    shared,
                    scheduler,
                    lists,
                    sizes,
                    tensors,
                    means,
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
                    WIDE_STEPS,
                    KEEP_Q,
                    MEANS,
                ),
            ),
            (
                produce,
                (
                    descriptors,
                    shared,
                    scheduler,
                    lists,
                    sizes,
                    tensors,
                    means,
                    permute,
                    BLOCK_K,
                    HEAD_DIM,
                    STAGES,
                    PERMUTE_KV,
                    FP8,
                    PAIRED,
                    WIDE_STEPS,
                    MEANS,
                ),
            ),
            (
                store_loop,
                (
                    out_desc,
                    shared,
                    scheduler,
                    lists,
                    sizes,
                    tensors,
                    means,
                    HEAD_DIM,
                    PERMUTED,
                    QUANTIZED,
                    PAIRED,
                    MEANS,
                ),
            ),
            (permute_kv, (descriptors, permute, lists, sizes, tensors, BLOCK_K, HEAD_DIM, PERMUTE_KV)),
        ],
        [4, 1, STORE_WARPS, 1],
        [CONSUMER, OTHER, OTHER, OTHER],
    )
