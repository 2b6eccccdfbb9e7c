"""Triton kernels of selection: block means in one read, and scores to block lists in one program per row.

The k-th best score of a row is found by bisecting on its bits: 32 counts over registers, no sort, no shared
memory, and exact, so that ties can be resolved by index. Top-p bisects on integer masses in the same way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .block_mask import BlockMask
from .selection import PPM, WEIGHT_ONE

EMPTY, FORCED, PARTIAL = 1, 2, 4


@triton.jit
def pool_fwd_kernel(
    x_ptr,
    rows_ptr,
    mask_ptr,
    out_ptr,
    seq,
    heads,
    blocks,
    stride_xb,
    stride_xs,
    stride_xh,
    stride_xd,
    stride_rb,
    stride_rh,
    stride_mb,
    HAS_ROWS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    # Heads run fastest, so that programs in flight together read neighbouring memory of (B, S, H, D).
    pid = tl.program_id(0)
    h = pid % heads
    i = (pid // heads) % blocks
    b = pid // (heads * blocks)
    o_d = tl.arange(0, DIM_PAD)
    x_ptr += b.to(tl.int64) * stride_xb + h.to(tl.int64) * stride_xh
    total = tl.zeros([DIM_PAD], tl.float32)
    count = 0.0
    for start in tl.static_range(0, BLOCK, CHUNK):
        o_in = start + tl.arange(0, CHUNK)
        slot = i * BLOCK + o_in
        valid = (slot < seq) & (o_in < BLOCK)
        row = slot
        if HAS_ROWS:
            row = tl.load(rows_ptr + b * stride_rb + h * stride_rh + slot, mask=valid, other=0)
        if HAS_MASK:
            valid = valid & (tl.load(mask_ptr + b * stride_mb + row, mask=valid, other=0) != 0)
        p_x = x_ptr + row.to(tl.int64)[:, None] * stride_xs + o_d[None, :] * stride_xd
        b_x = tl.load(p_x, mask=valid[:, None] & (o_d < DIM)[None, :], other=0.0)
        total += tl.sum(b_x.to(tl.float32), 0)
        count += tl.sum(valid.to(tl.float32), 0)
    p_out = out_ptr + ((b.to(tl.int64) * heads + h) * blocks + i) * DIM + o_d
    tl.store(p_out, total / tl.maximum(count, 1.0), mask=o_d < DIM)


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
    stride_qb,
    stride_qh,
    stride_cb,
    stride_ch,
    stride_mb,
    stride_mh,
    HAS_FLAGS: tl.constexpr,
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
        flags = tl.load(flags_ptr + b * stride_fb + h * stride_fh + j, mask=real, other=1).to(tl.int32)
        alive = real & ((flags & 1) == 0)
        forced = alive & ((flags & 2) != 0)
        candidate = alive & ((flags & 2) == 0)
        partial = partial | ((flags & 4) != 0)

    # Float order as integer order; both zeros are one value.
    lowest: tl.constexpr = -2147483648
    bits = tl.where(s == 0.0, 0, s.to(tl.int32, bitcast=True))
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(candidate, key, lowest)

    keep = forced
    if BY_COUNT:
        if count_ppm_ptr is None:
            ppm = count_ppm.to(tl.int64)
        else:
            ppm = tl.load(count_ppm_ptr + b * stride_cb + h * stride_ch)
        n = tl.sum(candidate.to(tl.int32), 0).to(tl.int64)
        count = ((n * ppm + (PPM - 1)) // PPM).to(tl.int32)
        at = lowest
        if tl.sum((key >= 0).to(tl.int32), 0) >= count:
            at = 0
        for step in range(31):
            trial = at + (1 << (30 - step))
            if tl.sum((key >= trial).to(tl.int32), 0) >= count:
                at = trial
        above = key > at
        tied = (key == at) & candidate
        quota = count - tl.sum(above.to(tl.int32), 0)
        keep = keep | above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= quota))
    if BY_MASS:
        if mass_ppm_ptr is None:
            ppm_m = mass_ppm.to(tl.int64)
        else:
            ppm_m = tl.load(mass_ppm_ptr + b * stride_mb + h * stride_mh)
        best = tl.max(tl.where(candidate, s, -big), 0)
        weight = (tl.exp(tl.minimum(tl.maximum(s, best - 80.0), best) - best) * WEIGHT_ONE).to(tl.int64) + 1
        weight = tl.where(candidate, weight, 0)
        need = tl.sum(weight, 0) * ppm_m
        at_m = lowest
        if tl.sum(tl.where(key >= 0, weight, 0), 0) * PPM >= need:
            at_m = 0
        for step in range(31):
            trial_m = at_m + (1 << (30 - step))
            if tl.sum(tl.where(key >= trial_m, weight, 0), 0) * PPM >= need:
                at_m = trial_m
        above_m = key > at_m
        tied_m = (key == at_m) & candidate
        rest = need - tl.sum(tl.where(above_m, weight, 0), 0) * PPM
        each = tl.maximum(tl.max(tl.where(tied_m, weight, 0), 0), 1) * PPM
        quota_m = (rest + each - 1) // each
        keep = keep | above_m | (tied_m & (tl.cumsum(tied_m.to(tl.int32), 0) <= quota_m))
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


def lead_strides(x: torch.Tensor | None) -> tuple[int, int]:
    """Strides of the two leading dimensions, 0 where the size is 1 (broadcast)."""
    if x is None:
        return 0, 0
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape[:2], x.stride()[:2]))


def pool_blocks_triton(
    x: torch.Tensor,
    block: int,
    *,
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :func:`dit_accel.kernels.selection.pool_blocks`."""
    batch, seq, heads, dim = x.shape
    n = triton.cdiv(seq, block)
    dim_pad = triton.next_power_of_2(dim)
    out = torch.empty(batch, heads, n, dim, dtype=torch.float32, device=x.device)
    if rows is not None and rows.stride(-1) != 1:
        rows = rows.contiguous()
    if key_mask is not None:
        key_mask = key_mask.expand(batch, seq).contiguous()
    with torch.cuda.device_of(x):
        pool_fwd_kernel[(batch * heads * n,)](
            x,
            rows,
            key_mask,
            out,
            seq,
            heads,
            n,
            *x.stride(),
            *lead_strides(rows),
            seq,
            HAS_ROWS=rows is not None,
            HAS_MASK=key_mask is not None,
            DIM=dim,
            DIM_PAD=dim_pad,
            BLOCK=block,
            CHUNK=min(triton.next_power_of_2(block), max(16, 16384 // dim_pad)),
            num_warps=4,
        )
    return out


def block_flags(
    forced_k: torch.Tensor | None, partial_k: torch.Tensor | None, empty_k: torch.Tensor | None
) -> torch.Tensor | None:
    """The three per-block masks as bits of one uint8 tensor ``[B|1, H|1, nk]``."""
    flags = None
    for mask, bit in ((empty_k, EMPTY), (forced_k, FORCED), (partial_k, PARTIAL)):
        if mask is not None:
            part = mask.to(torch.uint8) * bit
            flags = part if flags is None else flags | part
    return None if flags is None else flags.contiguous()


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
    keep_own: bool,
    block_q: int,
    block_k: int,
    q_len: int,
    kv_len: int,
    num_warps: int | None = None,
) -> BlockMask:
    """See :func:`dit_accel.kernels.selection.select_blocks`, whose checked arguments this takes."""
    if scores.stride(-1) != 1:
        scores = scores.contiguous()
    batch, heads, nq, nk = scores.shape
    flags = block_flags(forced_k, partial_k, empty_k)
    forced_q = None if forced_q is None else forced_q.to(torch.uint8).contiguous()
    own = (block_q - 1) // block_k + 2 if keep_own else 0
    unbounded = forced_q is not None or forced_k is not None or mass_ppm is not None
    width = list_width(nk, count_ppm, own, unbounded)
    block_width = max(32, triton.next_power_of_2(nk))
    counts = torch.empty(2, batch, heads, nq, dtype=torch.int32, device=scores.device)
    indices = torch.empty(batch, heads, nq, width, dtype=torch.int32, device=scores.device)
    count_tensor = count_ppm if isinstance(count_ppm, torch.Tensor) else None
    mass_tensor = mass_ppm if isinstance(mass_ppm, torch.Tensor) else None
    with torch.cuda.device_of(scores):
        select_fwd_kernel[(batch * heads * nq,)](
            scores,
            flags,
            forced_q,
            count_tensor,
            mass_tensor,
            count_ppm if isinstance(count_ppm, int) else 0,
            mass_ppm if isinstance(mass_ppm, int) else 0,
            indices,
            counts[0],
            counts[1],
            heads,
            nq,
            nk,
            width,
            q_len,
            kv_len,
            *scores.stride()[:3],
            *lead_strides(flags),
            *lead_strides(forced_q),
            *lead_strides(count_tensor),
            *lead_strides(mass_tensor),
            HAS_FLAGS=flags is not None,
            HAS_FORCED_Q=forced_q is not None,
            BY_COUNT=count_ppm is not None,
            BY_MASS=mass_ppm is not None,
            KEEP_OWN=keep_own,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            PPM=PPM,
            WEIGHT_ONE=WEIGHT_ONE,
            WIDTH=block_width,
            num_warps=num_warps or max(1, min(8, block_width // 1024)),
        )
    return BlockMask(
        kv_num_blocks=counts[0],
        kv_indices=indices,
        kv_num_full=counts[1],
        block_q=block_q,
        block_k=block_k,
        q_len=q_len,
        kv_len=kv_len,
    )
