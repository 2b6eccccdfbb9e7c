"""What the warps of the Hopper kernel share, as named tuples: they cost nothing, the compiler sees their members.

``kernel.py`` builds them once. The order of members is the order in which the compiler hands them to the warps.
No member may be called ``values`` or ``type``, which tuples of Triton have themselves.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Descriptors(NamedTuple):
    """TMA descriptors of q, k, v, the output, and of mean keys and values, None where there are none."""

    q: Any
    k: Any
    v: Any
    out: Any
    mean_k: Any
    mean_v: Any


class SharedStorage(NamedTuple):
    """Shared memory, but for what the tile scheduler and the permutation have of their own.

    Attributes:
        q_smem: four of ``[64, D]``, the two halves of two tiles of queries.
        k_smem, v_smem: a block of keys and one of values for each stage; FP8 values are ``[D, BLOCK_K]``.
        o_smem: outputs ``[64, D]``: the buffers of the queries, or two of their own where inputs are quantised.
        row_idx: four of ``[64]``, the rows in memory of two tiles of a permuted call.
        q_full, q_empty, k_full, v_full, o_full, o_empty: the buffers' barriers.
    """

    q_smem: Any
    k_smem: Any
    v_smem: Any
    o_smem: Any
    row_idx: Any
    q_full: Any
    q_empty: Any
    k_full: Any
    v_full: Any
    o_full: Any
    o_empty: Any


class SchedulerState(NamedTuple):
    """The queue of tiles.

    Attributes:
        counter_ptr: in global memory, the tiles that all programs have taken.
        work: in shared memory, the two tiles that this program took last.
        work_full, work_empty: their barriers.
    """

    counter_ptr: Any
    work: Any
    work_full: Any
    work_empty: Any


class BlockLists(NamedTuple):
    """The block mask of a batch entry, its permutation, and its key mask by slots of the permuted sequence.

    Of pairs ``counts_ptr`` has the headers (``mask/query_pairs.py``) and ``fulls_ptr`` nothing.
    """

    counts_ptr: Any
    fulls_ptr: Any
    index_ptr: Any
    bit_rows_ptr: Any
    bits_ptr: Any
    perm_ptr: Any
    key_mask_ptr: Any


class Sizes(NamedTuple):
    """Numbers of a launch.

    Attributes:
        nq: query blocks of a head, or pairs of them.
        num_tiles: those of all heads.
        mask_head_stride: counts from one head to the next, 0 where heads share them.
        list_length: entries in a row of the lists.
        q_rows, k_rows: rows of a head in the matrices that TMA reads q and k from.
        head_cols: columns of a head in them.
        ring: heads in the circular buffer of permuted keys and values; else all heads.
    """

    nq: Any
    num_tiles: Any
    mask_head_stride: Any
    list_length: Any
    q_rows: Any
    k_rows: Any
    head_cols: Any
    ring: Any


class Tensors(NamedTuple):
    """What lies in global memory, with its strides and lengths.

    Attributes:
        q_ptr, k_ptr, v_ptr: read by rows, in permuted calls.
        out_ptr, lse_ptr: output ``[S, H, D]`` and log-sum-exp ``[H, S]``.
        q_scale_ptr, k_scale_ptr, v_scale_ptr: scales of quantised inputs.
        q_shift_ptr: logits that smoothing the keys took from each row.
        perm_head_stride: from one head's permutation to the next, 0 where heads share it.
        softmax_scale_log2: the scale of the logits times log2(e).
    """

    k_ptr: Any
    v_ptr: Any
    stride_ks: Any
    stride_vs: Any
    stride_kh: Any
    stride_vh: Any
    q_ptr: Any
    stride_qs: Any
    stride_qh: Any
    out_ptr: Any
    lse_ptr: Any
    stride_os: Any
    stride_oh: Any
    q_scale_ptr: Any
    k_scale_ptr: Any
    v_scale_ptr: Any
    q_shift_ptr: Any
    perm_head_stride: Any
    q_len: Any
    kv_len: Any
    softmax_scale_log2: Any


class PermuteState(NamedTuple):
    """What the warp works with that puts permuted keys and values in order.

    Attributes:
        tile: one block in shared memory.
        row_idx: ``[2, BLOCK_K]`` in shared memory, the rows of this block and of the next.
        claimed_ptr: in global memory, the blocks that all programs have taken to move.
        full_ptr: of each head, its blocks that lie in the circular buffer.
        empty_ptr: of each head, its tiles that have loaded all of their blocks.
    """

    tile: Any
    row_idx: Any
    claimed_ptr: Any
    full_ptr: Any
    empty_ptr: Any


class Means(NamedTuple):
    """Means of left-out blocks; all None in calls without them.

    Attributes:
        kept_ptr: int32, of each query block of each head a row of bits: the key blocks that it reads.
        kept_head_stride: from one head's rows to the next, 0 where heads share them.
        kept_rows, kept_words: rows of a head, and words of a row.
        steps: blocks of 64 means that a head has; the last one may reach past its last mean.
        whole: a head's means of as many tokens as most have; one of fewer may follow.
        rows, cols: of a head in the matrices that TMA reads means from.
        log2_tokens, log2_rest: tokens of a mean, and of the last one where it has fewer; -inf where all are alike.
    """

    kept_ptr: Any
    kept_head_stride: Any
    kept_rows: Any
    kept_words: Any
    steps: Any
    whole: Any
    rows: Any
    cols: Any
    log2_tokens: Any
    log2_rest: Any
