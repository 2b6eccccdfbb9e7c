"""Triton kernels of VMoBA's threshold: the value is found digit by digit, from sums over all pairs of a head.

A sort of a head's pairs (700,000 at 75,600 tokens) takes longer than the selection may. Each of eight launches
reads the gates once, from the cache, and sums count and gates above sixteen candidate thresholds; the next launch
picks one of them and refines it. Partial sums lie in float64 and are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .triton_pooling import lead_strides

DIGITS, CANDIDATES = 8, 16
"""A float32 has eight digits of sixteen values."""
TILE_PAIRS, MAX_PARTS = 8192, 64


@triton.jit
def load_gates(
    gates_ptr,
    open_k_ptr,
    open_q_ptr,
    b,
    h,
    first,
    last,
    nk,
    stride_gb,
    stride_gh,
    stride_gq,
    stride_kb,
    stride_kh,
    stride_qb,
    stride_qh,
    seq_len,
    HAS_K: tl.constexpr,
    HAS_Q: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Gates of ROWS query blocks, which of them take part, and which share tokens."""
    i = first + tl.arange(0, ROWS)
    j = tl.arange(0, WIDTH)
    real = (i < last)[:, None] & (j < nk)[None, :]
    start = gates_ptr + b.to(tl.int64) * stride_gb + h.to(tl.int64) * stride_gh
    g = tl.load(start + i.to(tl.int64)[:, None] * stride_gq + j[None, :], mask=real, other=0.0).to(tl.float32)
    pair = real
    if HAS_K:
        open_k = tl.load(open_k_ptr + b * stride_kb + h * stride_kh + j, mask=j < nk, other=0) != 0
        pair = pair & open_k[None, :]
    if HAS_Q:
        open_q = tl.load(open_q_ptr + b * stride_qb + h * stride_qh + i, mask=i < last, other=0) != 0
        pair = pair & open_q[:, None]
    end_q = tl.minimum((i + 1) * BLOCK_Q, seq_len)
    own = ((j * BLOCK_K)[None, :] < end_q[:, None]) & (((j + 1) * BLOCK_K)[None, :] > (i * BLOCK_Q)[:, None])
    return g, pair, own & pair


@triton.jit
def gate_totals_kernel(
    gates_ptr,
    open_k_ptr,
    open_q_ptr,
    parts_ptr,
    heads,
    nq,
    nk,
    rows_each,
    stride_gb,
    stride_gh,
    stride_gq,
    stride_kb,
    stride_kh,
    stride_qb,
    stride_qh,
    seq_len,
    PARTS: tl.constexpr,
    HAS_K: tl.constexpr,
    HAS_Q: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Least gate, and sum and number of all pairs and of own pairs, of one part of a head's rows."""
    pid = tl.program_id(0)
    part = pid % PARTS
    h = (pid // PARTS) % heads
    b = pid // (PARTS * heads)
    least = tl.full([ROWS, WIDTH], float("inf"), tl.float32)
    total = tl.zeros([ROWS, WIDTH], tl.float64)
    total_own = tl.zeros([ROWS, WIDTH], tl.float64)
    count = tl.zeros([ROWS, WIDTH], tl.int32)
    count_own = tl.zeros([ROWS, WIDTH], tl.int32)
    last = tl.minimum((part + 1) * rows_each, nq)
    for first in range(part * rows_each, last, ROWS):
        g, pair, own = load_gates(
            gates_ptr, open_k_ptr, open_q_ptr, b, h, first, last, nk, stride_gb, stride_gh, stride_gq,
            stride_kb, stride_kh, stride_qb, stride_qh, seq_len, HAS_K, HAS_Q, BLOCK_Q, BLOCK_K, ROWS, WIDTH,
        )  # fmt: skip
        least = tl.minimum(least, tl.where(pair, g, float("inf")))
        total += tl.where(pair, g, 0.0).to(tl.float64)
        total_own += tl.where(own, g, 0.0).to(tl.float64)
        count += pair.to(tl.int32)
        count_own += own.to(tl.int32)
    p_out = parts_ptr + pid * 5
    tl.store(p_out, tl.min(tl.min(least, 1), 0).to(tl.float64))
    tl.store(p_out + 1, tl.sum(tl.sum(total, 1), 0))
    tl.store(p_out + 2, tl.sum(tl.sum(count, 1), 0).to(tl.float64))
    tl.store(p_out + 3, tl.sum(tl.sum(total_own, 1), 0))
    tl.store(p_out + 4, tl.sum(tl.sum(count_own, 1), 0).to(tl.float64))


@triton.jit(do_not_specialize=["digit", "step", "step_before"])
def gate_digit_kernel(
    gates_ptr,
    open_k_ptr,
    open_q_ptr,
    totals_ptr,
    state_ptr,
    sums_ptr,
    threshold_ptr,
    digit,
    step,
    step_before,
    heads,
    nq,
    nk,
    rows_each,
    stride_gb,
    stride_gh,
    stride_gq,
    stride_kb,
    stride_kh,
    stride_qb,
    stride_qh,
    seq_len,
    PARTS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    HAS_K: tl.constexpr,
    HAS_Q: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Settle the digit that the launch before summed up for, then sum for the next one.

    ``sums [digits, B * H, PARTS, 2, CANDIDATES]``: gates and number of a part's other pairs from each candidate
    on; ``state [digits, B * H]``: the threshold so far, as the gates' bits in rising order, from 0.
    """
    pid = tl.program_id(0)
    part = pid % PARTS
    head = pid // PARTS
    h = head % heads
    b = head // heads
    o_part = tl.arange(0, PARTS)
    o_k = tl.arange(0, CANDIDATES)
    lanes = tl.num_programs(0) // PARTS
    low = tl.zeros([1], tl.int64)
    if digit > 0:
        p_total = totals_ptr + head * PARTS * 5
        least = tl.min(tl.load(p_total + o_part * 5), 0)
        total = tl.sum(tl.load(p_total + o_part * 5 + 1), 0)
        total -= least * tl.sum(tl.load(p_total + o_part * 5 + 2), 0)
        total_own = tl.sum(tl.load(p_total + o_part * 5 + 3), 0)
        total_own -= least * tl.sum(tl.load(p_total + o_part * 5 + 4), 0)
        need = tl.load(threshold_ptr) * total - total_own
        p_sum = sums_ptr + ((digit - 1) * lanes + head) * PARTS * 2 * CANDIDATES
        p_part = p_sum + o_part[:, None] * (2 * CANDIDATES) + o_k[None, :]
        number = tl.sum(tl.load(p_part + CANDIDATES), 0)
        gained = tl.sum(tl.load(p_part), 0) - least * number
        # From candidate 0 on all is kept if need be; at least one pair is kept.
        enough = (gained >= need) & (number >= 1.0) & (o_k > 0)
        low += tl.load(state_ptr + (digit - 1) * lanes + head)
        low += tl.sum(enough.to(tl.int64), 0) * step_before.to(tl.int64)
    if part == 0:
        tl.store(state_ptr + digit * lanes + head + tl.arange(0, 1), low)
    last = tl.minimum((part + 1) * rows_each, nq)
    gates = tl.zeros([CANDIDATES], tl.float64)
    numbers = tl.zeros([CANDIDATES], tl.float64)
    start = tl.sum(low, 0)
    wide = step.to(tl.int64)  # fifteen of the first steps exceed 32 bits
    for first in range(part * rows_each, last, ROWS):
        g, pair, own = load_gates(
            gates_ptr, open_k_ptr, open_q_ptr, b, h, first, last, nk, stride_gb, stride_gh, stride_gq,
            stride_kb, stride_kh, stride_qb, stride_qh, seq_len, HAS_K, HAS_Q, BLOCK_Q, BLOCK_K, ROWS, WIDTH,
        )  # fmt: skip
        other = pair & (own == 0)
        bits = tl.where(g == 0.0, 0, g.to(tl.int32, bitcast=True))
        key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648
        for k in tl.static_range(CANDIDATES):
            above = other & (key >= start + k * wide)
            mass = tl.sum(tl.sum(tl.where(above, g, 0.0).to(tl.float64), 1), 0)
            number_k = tl.sum(tl.sum(above.to(tl.int32), 1), 0)
            gates += tl.where(o_k == k, mass, 0.0)
            numbers += tl.where(o_k == k, number_k.to(tl.float64), 0.0)
    p_out = sums_ptr + ((digit * lanes + head) * PARTS + part) * 2 * CANDIDATES + o_k
    tl.store(p_out, gates)
    tl.store(p_out + CANDIDATES, numbers)


@triton.jit
def gate_choice_kernel(
    gates_ptr,
    open_k_ptr,
    open_q_ptr,
    key_ptr,
    tied_ptr,
    keep_ptr,
    heads,
    nq,
    nk,
    stride_gb,
    stride_gh,
    stride_gq,
    stride_kb,
    stride_kh,
    stride_qb,
    stride_qh,
    seq_len,
    HAS_K: tl.constexpr,
    HAS_Q: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """2 for own pairs and those above the head's threshold, 1 for those at it where not all of them fit, else 0."""
    pid = tl.program_id(0)
    i = pid % nq
    head = pid // nq
    g, pair, own = load_gates(
        gates_ptr, open_k_ptr, open_q_ptr, head // heads, head % heads, i, i + 1, nk, stride_gb, stride_gh, stride_gq,
        stride_kb, stride_kh, stride_qb, stride_qh, seq_len, HAS_K, HAS_Q, BLOCK_Q, BLOCK_K, 1, WIDTH,
    )  # fmt: skip
    bits = tl.where(g == 0.0, 0, g.to(tl.int32, bitcast=True))
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648
    at = tl.load(key_ptr + head)
    all_fit = tl.load(tied_ptr + head) != 0
    keep = own | (pair & (key > at)) | (pair & (key == at) & all_fit)
    value = tl.where(keep, 2, tl.where(pair & (key == at), 1, 0)).to(tl.int8)
    j = tl.arange(0, WIDTH)
    tl.store(keep_ptr + pid.to(tl.int64) * nk + j[None, :], value, mask=(j < nk)[None, :])


def select_by_threshold_triton(
    gates: torch.Tensor,
    threshold: float,
    block_q: int,
    block_k: int,
    seq_len: int,
    open_k: torch.Tensor | None,
    open_q: torch.Tensor | None,
) -> torch.Tensor:
    """See :func:`dit_accel.kernels.gate.select_by_threshold`."""
    if gates.stride(-1) != 1:
        gates = gates.contiguous()
    batch, heads, nq, nk = gates.shape
    device, lanes = gates.device, batch * heads
    width = max(16, triton.next_power_of_2(nk))
    rows = max(1, TILE_PAIRS // width)
    parts = min(MAX_PARTS, triton.next_power_of_2(triton.cdiv(nq, rows)))
    # Every part has rows, so that none sums up an empty range: the last may have fewer.
    rows_each = triton.cdiv(triton.cdiv(nq, parts), rows) * rows
    open_k = None if open_k is None else open_k.to(torch.uint8).contiguous()
    open_q = None if open_q is None else open_q.to(torch.uint8).contiguous()
    totals = torch.empty(lanes, parts, 5, dtype=torch.float64, device=device)
    sums = torch.empty(DIGITS + 1, lanes, parts, 2, CANDIDATES, dtype=torch.float64, device=device)
    state = torch.empty(DIGITS + 1, lanes, dtype=torch.int64, device=device)
    # As a number it would reach the kernel in single precision.
    share = torch.full((1,), threshold, dtype=torch.float64, device=device)
    strides = (*gates.stride()[:3], *lead_strides(open_k), *lead_strides(open_q))
    masks = (open_k if open_k is not None else gates, open_q if open_q is not None else gates)
    geometry = {"HAS_K": open_k is not None, "HAS_Q": open_q is not None, "BLOCK_Q": block_q, "BLOCK_K": block_k}
    tiles = {"PARTS": parts, "ROWS": rows, "WIDTH": width, "num_warps": 8}
    keep = torch.empty(batch, heads, nq, nk, dtype=torch.int8, device=device)
    with torch.cuda.device_of(gates):
        gate_totals_kernel[(lanes * parts,)](
            gates, *masks, totals, heads, nq, nk, rows_each, *strides, seq_len, **geometry, **tiles
        )
        for digit in range(DIGITS + 1):
            # The last launch sums at the threshold that was found and just above it.
            step, before = (CANDIDATES ** max(DIGITS - 1 - n, 0) for n in (digit, digit - 1))
            gate_digit_kernel[(lanes * parts,)](
                gates, *masks, totals, state, sums, share, digit, step, before, heads, nq, nk,
                rows_each, *strides, seq_len, CANDIDATES=CANDIDATES, **geometry, **tiles,
            )  # fmt: skip
        quota, tied = _ties(totals, sums[-1], threshold)
        gate_choice_kernel[(lanes * nq,)](
            gates, *masks, state[-1], quota >= tied, keep, heads, nq, nk, *strides, seq_len, **geometry, WIDTH=width,
            num_warps=4,
        )  # fmt: skip
    first = (keep == 1).flatten(2)
    fits = first.cumsum(-1, dtype=torch.int32) <= quota.view(batch, heads, 1)
    return (keep == 2) | (first & fits).view(keep.shape)


def _ties(totals: torch.Tensor, sums: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of the pairs at the threshold are kept, and how many there are, ``[B * H]`` each."""
    least = totals[..., 0].amin(1)
    _, total, number, own, number_own = totals.sum(1).unbind(-1)
    need = threshold * (total - least * number) - (own - least * number_own)
    (gained, above), (count, count_above) = (part[:, :2].unbind(1) for part in sums.sum(1).unbind(1))
    tied = count - count_above
    each = (gained - above) / tied.clamp_min(1) - least
    rest = need - (above - least * count_above)
    quota = torch.ceil(rest / each.clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(1)
    # Nothing above a threshold below all pairs: everything is kept.
    return torch.minimum(quota, tied), tied
