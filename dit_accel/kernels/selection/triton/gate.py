"""Triton kernel of VMoBA's threshold: the value is found digit by digit, from sums over all pairs of a head.

A sort of a head's pairs (700,000 at 75,600 tokens) takes longer than the selection may. In each of eight steps the
gates are read once, from the L2 cache, and those above each of sixteen candidate thresholds summed; the next step
refines between two of these. Partial sums lie in float64 and are added in a fixed order.

All steps are one launch, since a dozen small ones cost more time than the sums. The programs of a head wait for each
other between steps, which is safe where all of a launch's programs run at once: it is a cooperative one. The
interpreter runs one program after the other, and so gets a launch for each step.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

from ...common.capability import interpreted, multiprocessors
from ...common.launch import ceil_div, lead_strides, power_of_two
from .gate_steps import (
    TOTALS,
    UNROLL,
    gate_of_key,
    load_room,
    load_totals,
    settle_digit,
    store_choice,
    store_first_tied,
    store_sums,
    store_tied,
    store_totals,
    wait_for_parts,
)

DIGITS, CANDIDATES = 8, 16
"""A float32 has eight digits of sixteen values."""
STEPS = DIGITS + 3
"""Totals, the digits, pairs at the threshold, choice."""
WARPS, WIDTH = 16, 256
"""Warps of a program, and key blocks of a tile, at most; a tile has one pair for each thread."""


@triton.jit(do_not_specialize=["threshold_bits", "begin", "end", "rows_each"])
def gate_kernel(
    gates_ptr,
    open_k_ptr,
    open_q_ptr,
    totals_ptr,
    sums_ptr,
    tied_ptr,
    arrived_ptr,
    keep_ptr,
    threshold_bits,
    begin,
    end,
    lanes,
    heads,
    parts,
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
    TOGETHER: tl.constexpr,
    DIGITS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_K: tl.constexpr,
    HAS_Q: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_ALL: tl.constexpr,
):
    """Steps ``begin`` to ``end`` of heads; a program has one part of the rows of every so many heads.

    ``totals [B * H, parts, TOTALS]`` and ``sums [DIGITS, B * H, parts, CANDIDATES]`` float64, ``tied [B * H, parts]``
    int32; ``arrived [B * H]`` int32: zeros, counts programs that have finished steps.
    """
    part = tl.program_id(0) % parts
    first = part * rows_each
    last = tl.minimum(first + rows_each, nq)
    threshold = threshold_bits.to(tl.int64).to(tl.float64, bitcast=True)
    for lane in range(tl.program_id(0) // parts, lanes, tl.num_programs(0) // parts):
        b = (lane // heads).to(tl.int64)
        h = (lane % heads).to(tl.int64)
        p_gates = gates_ptr + b * stride_gb + h * stride_gh
        p_k = open_k_ptr
        p_q = open_q_ptr
        if HAS_K:
            p_k += b * stride_kb + h * stride_kh
        if HAS_Q:
            p_q += b * stride_qb + h * stride_qh
        p_totals = totals_ptr + lane * parts * TOTALS
        p_tied = tied_ptr + lane * parts
        if begin == 0:
            store_totals(
                p_gates, p_k, p_q, p_totals + part * TOTALS, first, last, nk, stride_gq, seq_len,
                HAS_K, HAS_Q, BLOCK_Q, BLOCK_K, ROWS, WIDTH,
            )  # fmt: skip
            if TOGETHER:
                wait_for_parts(arrived_ptr + lane, parts)
        if end > 1:
            least, most, need = load_totals(p_totals, threshold, parts, PARTS)
            low = tl.zeros([], tl.int64)
            above = tl.zeros([], tl.float64)
            step = tl.full([], CANDIDATES ** (DIGITS - 1), tl.int64)
            for digit in range(tl.minimum(end - 1, DIGITS)):
                p_sums = sums_ptr + (digit * lanes + lane) * parts * CANDIDATES
                if digit + 1 >= begin:
                    store_sums(
                        p_gates, p_k, p_q, p_sums + part * CANDIDATES, low, step, least, first, last, nk, stride_gq,
                        seq_len, CANDIDATES, HAS_K, HAS_Q, BLOCK_Q, BLOCK_K, ROWS, WIDTH,
                    )  # fmt: skip
                    if TOGETHER:
                        wait_for_parts(arrived_ptr + lane, (digit + 2) * parts)
                # Where a launch ends here, other parts may still be missing, and what this finds is not used.
                low, above = settle_digit(p_sums, low, step, most, need, parts, PARTS, CANDIDATES)
                step = step // CANDIDATES
            if end > DIGITS + 1:
                # Below minus infinity lie only NaNs: where all pairs are kept, that is the threshold.
                at = gate_of_key(tl.maximum(low, 0x7FFFFF))
                if begin <= DIGITS + 1:
                    store_tied(
                        p_gates, p_k, p_q, p_tied + part, at, first, last, nk, stride_gq, seq_len,
                        HAS_K, HAS_Q, BLOCK_Q, BLOCK_K, ROWS, WIDTH,
                    )  # fmt: skip
                    if TOGETHER:
                        wait_for_parts(arrived_ptr + lane, (DIGITS + 2) * parts)
                if end > DIGITS + 2:
                    p_keep = keep_ptr + (b * heads + h) * nq * nk
                    all_fit, room = load_room(p_tied, at, need, above, least, part, parts, PARTS)
                    store_choice(
                        p_gates, p_k, p_q, p_keep, at, all_fit, first, last, nk, stride_gq, seq_len,
                        HAS_K, HAS_Q, BLOCK_Q, BLOCK_K, ROWS, WIDTH,
                    )  # fmt: skip
                    if all_fit == 0:
                        store_first_tied(
                            p_gates, p_k, p_q, p_keep, at, room, first, last, nk, stride_gq, seq_len,
                            HAS_K, HAS_Q, BLOCK_Q, BLOCK_K, WIDTH_ALL,
                        )  # fmt: skip


def select_by_threshold_triton(
    gates: torch.Tensor,
    threshold: float,
    block_q: int,
    block_k: int,
    seq_len: int,
    open_k: torch.Tensor | None,
    open_q: torch.Tensor | None,
    programs: int | None = None,
) -> torch.Tensor:
    """See :func:`dit_accel.kernels.selection.gate.select_by_threshold`.

    ``programs`` that run at once: one on each of the device's multiprocessors if left out, which is the most.
    """
    if gates.stride(-1) != 1:
        gates = gates.contiguous()
    batch, heads, nq, nk = gates.shape
    device, lanes = gates.device, batch * heads
    together = not interpreted()
    if programs is None:
        programs = multiprocessors(device.index or 0) if together else 4
    parts = max(1, programs // lanes)
    width = min(WIDTH, power_of_two(nk))
    rows = 32 * WARPS // width
    # Whole groups of tiles, but for the last part, and no part without rows.
    rows_each = ceil_div(ceil_div(nq, parts), rows * UNROLL.value) * rows * UNROLL.value
    parts = ceil_div(nq, rows_each)
    open_k = None if open_k is None else open_k.contiguous().view(torch.uint8)
    open_q = None if open_q is None else open_q.contiguous().view(torch.uint8)
    totals = torch.empty(lanes, parts, TOTALS.value, dtype=torch.float64, device=device)
    sums = torch.empty(DIGITS, lanes, parts, CANDIDATES, dtype=torch.float64, device=device)
    tied = torch.empty(lanes, parts, dtype=torch.int32, device=device)
    arrived = torch.zeros(lanes, dtype=torch.int32, device=device)
    keep = torch.empty(batch, heads, nq, nk, dtype=torch.uint8, device=device)
    # As a float it would reach the kernel in single precision.
    (threshold_bits,) = struct.unpack("<q", struct.pack("<d", threshold))
    with torch.cuda.device_of(gates):
        for begin, end in [(0, STEPS)] if together else [(n, n + 1) for n in range(STEPS)]:
            gate_kernel[(parts * min(lanes, programs // parts),)](
                gates,
                open_k,
                open_q,
                totals,
                sums,
                tied,
                arrived,
                keep,
                threshold_bits,
                begin,
                end,
                lanes,
                heads,
                parts,
                nq,
                nk,
                rows_each,
                *gates.stride()[:3],
                *lead_strides(open_k),
                *lead_strides(open_q),
                seq_len,
                TOGETHER=together,
                DIGITS=DIGITS,
                CANDIDATES=CANDIDATES,
                PARTS=power_of_two(parts),
                HAS_K=open_k is not None,
                HAS_Q=open_q is not None,
                BLOCK_Q=block_q,
                BLOCK_K=block_k,
                ROWS=rows,
                WIDTH=width,
                WIDTH_ALL=power_of_two(nk),
                num_warps=WARPS,
                launch_cooperative_grid=together,
            )
    return keep.view(torch.bool)
