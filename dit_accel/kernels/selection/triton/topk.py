"""Triton kernel of selection: scores to block lists, one program per row.

The k-th best score of a row is found by bisecting on its bits: 32 counts over registers, no sort, no shared
memory, and exact, so that ties can be resolved by index. Top-p bisects on integer masses in the same way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...common.compiled import KeptKernel
from ...common.launch import lead_strides, power_of_two
from ...common.shares import PPM, WEIGHT_ONE
from ...mask.block_mask import BlockMask
from ...mask.triton_lists import row_warps

EMPTY, FORCED, PARTIAL = 1, 2, 4


@triton.jit
def select_fwd_kernel(
    scores_ptr,
    flags_ptr,
    forced_q_ptr,
    count_ppm_ptr,
    mass_ppm_ptr,
    count_ppm,
    mass_ppm,
    indices_ptr,
    num_ptr,
    num_full_ptr,
    heads,
    nq,
    nk,
    width,
    q_len,
    kv_len,
    stride_sb,
    stride_sh,
    stride_sq,
    stride_fb,
    stride_fh,
    stride_fq,
    stride_qb,
    stride_qh,
    stride_cb,
    stride_ch,
    stride_mb,
    stride_mh,
    HAS_FLAGS: tl.constexpr,
    FLAG: tl.constexpr,
    HAS_FORCED_Q: tl.constexpr,
    BY_COUNT: tl.constexpr,
    BY_MASS: tl.constexpr,
    KEEP_OWN: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PPM: tl.constexpr,
    WEIGHT_ONE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    pid = tl.program_id(0)
    i = pid % nq
    h = (pid // nq) % heads
    b = pid // (nq * heads)
    j = tl.arange(0, WIDTH)
    real = j < nk
    p_s = scores_ptr + b.to(tl.int64) * stride_sb + h.to(tl.int64) * stride_sh + i.to(tl.int64) * stride_sq
    s = tl.load(p_s + j, mask=real, other=0.0).to(tl.float32)
    big = 3.4028234663852886e38
    s = tl.where(s == s, s, -big)
    s = tl.minimum(tl.maximum(s, -big), big)

    alive = real
    candidate = real
    forced = j < 0
    partial = (j + 1) * BLOCK_K > kv_len
    if HAS_FLAGS:
        p_f = flags_ptr + b.to(tl.int64) * stride_fb + h.to(tl.int64) * stride_fh + i.to(tl.int64) * stride_fq
        flags = tl.load(p_f + j, mask=real, other=1).to(tl.int32) * FLAG
        alive = real & ((flags & 1) == 0)
        forced = alive & ((flags & 2) != 0)
        candidate = alive & ((flags & 2) == 0)
        partial = partial | ((flags & 4) != 0)

    # Float order as integer order; both zeros are one value.
    lowest: tl.constexpr = -2147483648
    bits = tl.where(s == 0.0, 0, s.to(tl.int32, bitcast=True))
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(candidate, key, lowest)

    low = tl.min(tl.where(candidate, key, 2147483647), 0).to(tl.int64)
    high = tl.max(key, 0).to(tl.int64) + 1
    keep = forced
    if BY_COUNT:
        ppm = count_ppm
        if count_ppm_ptr is not None:
            ppm = tl.load(count_ppm_ptr + b * stride_cb + h * stride_ch)
        left = tl.sum(candidate.to(tl.int32), 0)
        count = ((left.to(tl.int64) * ppm + (PPM - 1)) // PPM).to(tl.int32)
        lo, hi = low, high
        # left = entries from lo on. Most rows separate after a dozen halvings, ties take 32.
        while (hi - lo > 1) & (left != count):
            middle = lo + (hi - lo) // 2
            found = tl.sum((key >= middle.to(tl.int32)).to(tl.int32), 0)
            enough = found >= count
            lo = tl.where(enough, middle, lo)
            hi = tl.where(enough, hi, middle)
            left = tl.where(enough, found, left)
        at = lo.to(tl.int32)
        above = key > at
        tied = (key == at) & candidate
        quota = count - tl.sum(above.to(tl.int32), 0)
        # The scan that gives ties to the lower index is needed only when they do not all fit.
        if tl.sum(tied.to(tl.int32), 0) > quota:
            tied = tied & (tl.cumsum(tied.to(tl.int32), 0) <= quota)
        keep = keep | above | tied
    if BY_MASS:
        ppm_m = mass_ppm
        if mass_ppm_ptr is not None:
            ppm_m = tl.load(mass_ppm_ptr + b * stride_mb + h * stride_mh)
        best = tl.max(tl.where(candidate, s, -big), 0)
        weight = (tl.exp(tl.minimum(tl.maximum(s, best - 80.0), best) - best) * WEIGHT_ONE).to(tl.int64) + 1
        weight = tl.where(candidate, weight, 0)
        total = tl.sum(weight, 0)
        need = total * ppm_m
        # Mass in the high bits, number of entries in the low 15: both from one sum.
        packed = tl.where(candidate, weight * 32768 + 1, 0)
        lo_m, hi_m = low, high
        left_m = tl.sum(candidate.to(tl.int64), 0)
        right_m = left_m * 0
        while (hi_m - lo_m > 1) & (left_m - right_m > 1):
            middle_m = lo_m + (hi_m - lo_m) // 2
            found_m = tl.sum(tl.where(key >= middle_m.to(tl.int32), packed, 0), 0)
            enough_m = (found_m // 32768) * PPM >= need
            lo_m = tl.where(enough_m, middle_m, lo_m)
            hi_m = tl.where(enough_m, hi_m, middle_m)
            left_m = tl.where(enough_m, found_m % 32768, left_m)
            right_m = tl.where(enough_m, right_m, found_m % 32768)
        inside = candidate & (key >= lo_m.to(tl.int32))
        at_m = tl.min(tl.where(inside, key, 2147483647), 0)
        above_m = key > at_m
        tied_m = (key == at_m) & candidate
        rest = need - tl.sum(tl.where(above_m, weight, 0), 0) * PPM
        each = tl.maximum(tl.max(tl.where(tied_m, weight, 0), 0), 1) * PPM
        quota_m = (rest + each - 1) // each
        if tl.sum(tied_m.to(tl.int32), 0) > quota_m:
            tied_m = tied_m & (tl.cumsum(tied_m.to(tl.int32), 0) <= quota_m)
        keep = keep | above_m | tied_m
    if HAS_FORCED_Q:
        read_all = tl.load(forced_q_ptr + b * stride_qb + h * stride_qh + i).to(tl.int32)
        keep = keep | (alive & (j < read_all * WIDTH))
    if KEEP_OWN:
        first_q = i * BLOCK_Q
        end_q = tl.minimum(first_q + BLOCK_Q, q_len)
        keep = keep | (alive & (j * BLOCK_K < end_q) & ((j + 1) * BLOCK_K > first_q))

    # One scan places both lists: full blocks count in the low half, partial ones in the high half.
    full = keep & (partial == 0)
    rank = tl.cumsum(tl.where(full, 1, tl.where(keep, 65536, 0)), 0)
    num_full = tl.sum(full.to(tl.int32), 0)
    place = tl.where(full, (rank & 65535) - 1, num_full + (rank >> 16) - 1)
    tl.store(indices_ptr + pid.to(tl.int64) * width + place, j, mask=keep)
    tl.store(num_ptr + pid, tl.sum(keep.to(tl.int32), 0))
    tl.store(num_full_ptr + pid, num_full)


_SELECT = KeptKernel(select_fwd_kernel)


def block_flags(
    forced_k: torch.Tensor | None,
    partial_k: torch.Tensor | None,
    empty_k: torch.Tensor | None,
    hidden: torch.Tensor | None,
) -> tuple[torch.Tensor | None, int]:
    """The masks of key blocks, and of pairs, as bits of one uint8 tensor ``[B|1, H|1, nk]`` or ``[..., nq|1, nk]``, and
    what a bit of the tensor stands for: 1, or where there is one mask, which needs no pass then, the mask's bit."""
    masks = ((empty_k, EMPTY), (forced_k, FORCED), (partial_k, PARTIAL), (hidden, EMPTY))
    given = [(mask, bit) for mask, bit in masks if mask is not None]
    if not given:
        return None, 1
    if len(given) == 1:
        mask, bit = given[0]
        return mask.contiguous().view(torch.uint8), bit
    flags = None
    for mask, bit in given:
        part = (mask if mask.dim() == 4 else mask[..., None, :]).to(torch.uint8) * bit
        flags = part if flags is None else flags | part
    assert flags is not None
    return flags.contiguous(), 1


def list_width(nk: int, count_ppm: int | torch.Tensor | None, own: int, any_row_full: bool) -> int:
    """How many entries a row can need at most, as far as the host knows."""
    if not isinstance(count_ppm, int) or any_row_full:
        return nk
    return min(nk, (nk * count_ppm + PPM - 1) // PPM + own)


def select_blocks_triton(
    scores: torch.Tensor,
    *,
    count_ppm: int | torch.Tensor | None,
    mass_ppm: int | torch.Tensor | None,
    forced_q: torch.Tensor | None,
    forced_k: torch.Tensor | None,
    partial_k: torch.Tensor | None,
    empty_k: torch.Tensor | None,
    hidden: torch.Tensor | None,
    keep_own: bool,
    block_q: int,
    block_k: int,
    q_len: int,
    kv_len: int,
    num_warps: int | None = None,
) -> BlockMask:
    """See :func:`dit_accel.kernels.selection.api.select_blocks`, whose checked arguments this takes."""
    if scores.stride(-1) != 1:
        scores = scores.contiguous()
    batch, heads, nq, nk = scores.shape
    flags, flag = block_flags(forced_k, partial_k, empty_k, hidden)
    forced_q = None if forced_q is None else forced_q.contiguous().view(torch.uint8)
    own = (block_q - 1) // block_k + 2 if keep_own else 0
    unbounded = forced_q is not None or forced_k is not None or mass_ppm is not None
    width = list_width(nk, count_ppm, own, unbounded)
    block_width = max(32, power_of_two(nk))
    number, number_full = torch.empty(2, batch, heads, nq, dtype=torch.int32, device=scores.device).unbind()
    indices = torch.empty(batch, heads, nq, width, dtype=torch.int32, device=scores.device)
    count_tensor = count_ppm if isinstance(count_ppm, torch.Tensor) else None
    mass_tensor = mass_ppm if isinstance(mass_ppm, torch.Tensor) else None
    with torch.cuda.device_of(scores):
        _SELECT[(batch * heads * nq,)](
            scores,
            flags,
            forced_q,
            count_tensor,
            mass_tensor,
            count_ppm if isinstance(count_ppm, int) else 0,
            mass_ppm if isinstance(mass_ppm, int) else 0,
            indices,
            number,
            number_full,
            heads,
            nq,
            nk,
            width,
            q_len,
            kv_len,
            *scores.stride()[:3],
            *lead_strides(flags),
            0 if flags is None or flags.dim() == 3 or flags.shape[2] == 1 else flags.stride(2),
            *lead_strides(forced_q),
            *lead_strides(count_tensor),
            *lead_strides(mass_tensor),
            HAS_FLAGS=flags is not None,
            FLAG=flag,
            HAS_FORCED_Q=forced_q is not None,
            BY_COUNT=count_ppm is not None,
            BY_MASS=mass_ppm is not None,
            KEEP_OWN=keep_own,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            PPM=PPM,
            WEIGHT_ONE=WEIGHT_ONE,
            WIDTH=block_width,
            num_warps=num_warps or row_warps(block_width, mass_ppm is not None),
        )
    return BlockMask(
        kv_num_blocks=number,
        kv_indices=indices,
        kv_num_full=number_full,
        block_q=block_q,
        block_k=block_k,
        q_len=q_len,
        kv_len=kv_len,
    )
