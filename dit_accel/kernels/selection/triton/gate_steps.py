"""Steps of VMoBA's threshold kernel. Each program sees a part of a head's rows; results of parts meet in memory.

A thread holds one element of a tile and sums over tiles by itself, so that the loops over tiles have no barrier.
"""

from __future__ import annotations

import triton
import triton.language as tl

LEAST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)
"""In place of the gates of pairs to leave out: finite, and below every candidate."""
UNROLL: tl.constexpr = tl.constexpr(4)
"""Tiles whose loads are under way together."""
TOTALS: tl.constexpr = tl.constexpr(8)
"""Numbers that a part leaves of its totals, of which six are used."""


@triton.jit
def wait_for_parts(arrived_ptr, number):
    """Go on once ``number`` programs have come here; what they stored before can then be read."""
    tl.debug_barrier()  # the program's other threads have stored
    tl.atomic_add(arrived_ptr, 1, sem="release")
    while tl.atomic_add(arrived_ptr, 0, sem="acquire") < number:
        pass
    tl.debug_barrier()


@triton.jit
def gate_of_key(key):
    """The float32 whose place in rising order is ``key``, an int64 from 0; NaN beyond the infinities."""
    bits = tl.minimum(key - 2147483648, 2147483647).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def columns(j, nk, open_k_ptr, seq_len, HAS_K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which key blocks ``j`` take part, and the range of query blocks that share tokens with each."""
    take_part = j < nk
    if HAS_K:
        take_part = take_part & (tl.load(open_k_ptr + j, mask=take_part, other=0) != 0)
    own_first = j * BLOCK_K // BLOCK_Q
    own_last = tl.where(j * BLOCK_K < seq_len, ((j + 1) * BLOCK_K + BLOCK_Q - 1) // BLOCK_Q, 0)
    return take_part, own_first, own_last


@triton.jit
def tile_pairs(i, last, open_q_ptr, take_part, own_first, own_last, HAS_Q: tl.constexpr):
    """Of query blocks ``i`` and :func:`columns`: pairs that take part, and which of them share no tokens."""
    pair = (i < last) & take_part
    if HAS_Q:
        pair = pair & (tl.load(open_q_ptr + i, mask=i < last, other=0) != 0)
    return pair, pair & ((i < own_first) | (i >= own_last))


@triton.jit
def store_totals(
    gates_ptr, open_k_ptr, open_q_ptr, out_ptr, first, last, nk, stride_gq, seq_len,
    HAS_K: tl.constexpr, HAS_Q: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Least gate; sum, number and greatest of the pairs without shared tokens; sum and number of the others."""
    o_i = tl.arange(0, ROWS)[:, None]
    o_j = tl.arange(0, WIDTH)[None, :]
    least = tl.full([ROWS, WIDTH], float("inf"), tl.float32)
    most = tl.full([ROWS, WIDTH], float("-inf"), tl.float32)
    total = tl.zeros([ROWS, WIDTH], tl.float64)
    total_own = tl.zeros([ROWS, WIDTH], tl.float64)
    count = tl.zeros([ROWS, WIDTH], tl.int32)
    count_own = tl.zeros([ROWS, WIDTH], tl.int32)
    for column in range(0, nk, WIDTH):
        j = column + o_j
        take_part, own_first, own_last = columns(j, nk, open_k_ptr, seq_len, HAS_K, BLOCK_Q, BLOCK_K)
        for row in tl.range(first, last, ROWS, loop_unroll_factor=UNROLL):
            i = row + o_i
            pair, other = tile_pairs(i, last, open_q_ptr, take_part, own_first, own_last, HAS_Q)
            own = pair & (other == 0)
            g = tl.load(gates_ptr + i.to(tl.int64) * stride_gq + j, mask=pair, other=0.0).to(tl.float32)
            least = tl.minimum(least, tl.where(pair, g, float("inf")))
            most = tl.maximum(most, tl.where(other, g, float("-inf")))
            total += tl.where(other, g, 0.0).to(tl.float64)
            total_own += tl.where(own, g, 0.0).to(tl.float64)
            count += other.to(tl.int32)
            count_own += own.to(tl.int32)
    tl.store(out_ptr, tl.min(tl.min(least, 1), 0).to(tl.float64))
    tl.store(out_ptr + 1, tl.max(tl.max(most, 1), 0).to(tl.float64))
    tl.store(out_ptr + 2, tl.sum(tl.sum(total, 1), 0))
    tl.store(out_ptr + 3, tl.sum(tl.sum(total_own, 1), 0))
    tl.store(out_ptr + 4, tl.sum(tl.sum(count, 1), 0).to(tl.float64))
    tl.store(out_ptr + 5, tl.sum(tl.sum(count_own, 1), 0).to(tl.float64))


@triton.jit
def load_totals(totals_ptr, threshold, parts, PARTS: tl.constexpr):
    """Of a head: its least gate, the greatest of the pairs to choose from, and the sum that these need to reach."""
    o_part = tl.arange(0, PARTS)
    real = o_part < parts
    p_part = totals_ptr + o_part * TOTALS
    # Past the L1 cache: other multiprocessors have written this since the launch.
    least = tl.min(tl.load(p_part, mask=real, other=float("inf"), cache_modifier=".cg"), 0)
    most = tl.max(tl.load(p_part + 1, mask=real, other=float("-inf"), cache_modifier=".cg"), 0)
    total = tl.sum(tl.load(p_part + 2, mask=real, other=0.0, cache_modifier=".cg"), 0)
    own = tl.sum(tl.load(p_part + 3, mask=real, other=0.0, cache_modifier=".cg"), 0)
    count = tl.sum(tl.load(p_part + 4, mask=real, other=0.0, cache_modifier=".cg"), 0)
    count_own = tl.sum(tl.load(p_part + 5, mask=real, other=0.0, cache_modifier=".cg"), 0)
    own_above = own - least * count_own
    total_above = total - least * count + own_above
    # Where all gates are the same none adds anything, and all are kept.
    need = tl.where(total_above > 0.0, threshold * total_above - own_above, float("inf"))
    return least, most, need


@triton.jit
def store_sums(
    gates_ptr, open_k_ptr, open_q_ptr, out_ptr, low, step, least, first, last, nk, stride_gq, seq_len,
    CANDIDATES: tl.constexpr, HAS_K: tl.constexpr, HAS_Q: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gates, less the least one, from each of the candidates ``low + step, low + 2 step ...`` on."""
    o_i = tl.arange(0, ROWS)[:, None]
    o_j = tl.arange(0, WIDTH)[None, :]
    o_k = tl.arange(0, CANDIDATES)
    candidate = gate_of_key(low + (o_k + 1).to(tl.int64) * step)[:, None, None]
    sums = tl.zeros([CANDIDATES, ROWS, WIDTH], tl.float64)
    for column in range(0, nk, WIDTH):
        j = column + o_j
        take_part, own_first, own_last = columns(j, nk, open_k_ptr, seq_len, HAS_K, BLOCK_Q, BLOCK_K)
        for row in tl.range(first, last, ROWS, loop_unroll_factor=UNROLL):
            i = row + o_i
            _, other = tile_pairs(i, last, open_q_ptr, take_part, own_first, own_last, HAS_Q)
            g = tl.load(gates_ptr + i.to(tl.int64) * stride_gq + j, mask=other, other=LEAST).to(tl.float32)
            above = (g.to(tl.float64) - least)[None, :, :]
            # The bits of a float32 one are the upper half of 2^-7 in float64: a comparison and a product for each
            # candidate, where a selection of float64 takes two instructions more.
            one = tl.where(g[None, :, :] >= candidate, 1.0, 0.0).to(tl.int32, bitcast=True).to(tl.int64)
            sums += above * (one << 32).to(tl.float64, bitcast=True)
    tl.store(out_ptr + o_k, tl.sum(tl.sum(sums, 2), 1) * 128.0)


@triton.jit
def settle_digit(sums_ptr, low, step, most, need, parts, PARTS: tl.constexpr, CANDIDATES: tl.constexpr):
    """The highest candidate from which on the gates suffice (``low`` if none), and the sum from the next one on."""
    o_part = tl.arange(0, PARTS)[:, None]
    o_k = tl.arange(0, CANDIDATES)
    p_part = sums_ptr + o_part * CANDIDATES + o_k[None, :]
    gained = tl.sum(tl.load(p_part, mask=o_part < parts, other=0.0, cache_modifier=".cg"), 0)
    # At least one pair is kept. The last candidate is where the digits of this place end.
    enough = (gained >= need) & (gate_of_key(low + (o_k + 1).to(tl.int64) * step) <= most) & (o_k < CANDIDATES - 1)
    digit = tl.max(tl.where(enough, o_k + 1, 0), 0)
    return low + digit.to(tl.int64) * step, tl.sum(tl.where(o_k == digit, gained, 0.0), 0)


@triton.jit
def store_tied(
    gates_ptr, open_k_ptr, open_q_ptr, out_ptr, at, first, last, nk, stride_gq, seq_len,
    HAS_K: tl.constexpr, HAS_Q: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Number of pairs to choose from whose gate is the threshold ``at``."""
    o_i = tl.arange(0, ROWS)[:, None]
    o_j = tl.arange(0, WIDTH)[None, :]
    tied = tl.zeros([ROWS, WIDTH], tl.int32)
    for column in range(0, nk, WIDTH):
        j = column + o_j
        take_part, own_first, own_last = columns(j, nk, open_k_ptr, seq_len, HAS_K, BLOCK_Q, BLOCK_K)
        for row in tl.range(first, last, ROWS, loop_unroll_factor=UNROLL):
            i = row + o_i
            _, other = tile_pairs(i, last, open_q_ptr, take_part, own_first, own_last, HAS_Q)
            g = tl.load(gates_ptr + i.to(tl.int64) * stride_gq + j, mask=other, other=0.0).to(tl.float32)
            tied += (other & (g == at)).to(tl.int32)
    tl.store(out_ptr, tl.sum(tl.sum(tied, 1), 0))


@triton.jit
def load_room(tied_ptr, at, need, above, least, part, parts, PARTS: tl.constexpr):
    """Whether all pairs at the threshold are kept; if not, how many of this part and later ones."""
    o_part = tl.arange(0, PARTS)
    tied = tl.load(tied_ptr + o_part, mask=o_part < parts, other=0, cache_modifier=".cg")
    each = tl.maximum(at.to(tl.float64) - least, 2.2250738585072014e-308)
    quota = tl.maximum(tl.ceil((need - above) / each), 1.0)
    # Written so that a NaN, of infinite gates, keeps them.
    all_fit = (quota < tl.sum(tied, 0).to(tl.float64)) == 0
    before = tl.sum(tl.where(o_part < part, tied, 0), 0)
    room = tl.minimum(tl.where(all_fit, 0.0, quota), 2147483647.0).to(tl.int32) - before
    return all_fit, room


@triton.jit
def store_choice(
    gates_ptr, open_k_ptr, open_q_ptr, keep_ptr, at, all_fit, first, last, nk, stride_gq, seq_len,
    HAS_K: tl.constexpr, HAS_Q: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Which pairs are kept, but for those at the threshold where not all of them are."""
    fits = all_fit != 0  # a mask must be of bits
    o_i = tl.arange(0, ROWS)[:, None]
    o_j = tl.arange(0, WIDTH)[None, :]
    for column in range(0, nk, WIDTH):
        j = column + o_j
        take_part, own_first, own_last = columns(j, nk, open_k_ptr, seq_len, HAS_K, BLOCK_Q, BLOCK_K)
        for row in tl.range(first, last, ROWS, loop_unroll_factor=UNROLL):
            i = row + o_i
            pair, other = tile_pairs(i, last, open_q_ptr, take_part, own_first, own_last, HAS_Q)
            g = tl.load(gates_ptr + i.to(tl.int64) * stride_gq + j, mask=other, other=LEAST).to(tl.float32)
            tied = other & (g == at)
            keep = (pair & (other == 0)) | (other & (g > at)) | (tied & fits)
            open_to_write = (i < last) & (j < nk) & (fits | (tied == 0))
            tl.store(keep_ptr + i.to(tl.int64) * nk + j, keep.to(tl.uint8), mask=open_to_write)


@triton.jit
def store_first_tied(
    gates_ptr, open_k_ptr, open_q_ptr, keep_ptr, at, room, first, last, nk, stride_gq, seq_len,
    HAS_K: tl.constexpr, HAS_Q: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of the pairs at the threshold, keep the first ``room`` in the order of their indices, a row at a time."""
    j = tl.arange(0, WIDTH)
    take_part, own_first, own_last = columns(j, nk, open_k_ptr, seq_len, HAS_K, BLOCK_Q, BLOCK_K)
    for n in range(last - first):
        i = first + n
        _, other = tile_pairs(i, last, open_q_ptr, take_part, own_first, own_last, HAS_Q)
        row = i.to(tl.int64)
        g = tl.load(gates_ptr + row * stride_gq + j, mask=other, other=LEAST).to(tl.float32)
        tied = other & (g == at)
        rank = tl.cumsum(tied.to(tl.int32), 0)
        tl.store(keep_ptr + row * nk + j, (rank <= room).to(tl.uint8), mask=tied)
        room -= tl.sum(tied.to(tl.int32), 0)
