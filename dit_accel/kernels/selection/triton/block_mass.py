"""Triton kernels of the exact block mass: a log-sum-exp pass, and a pass that sums probabilities by block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...common.compiled import KeptKernel
from ...common.launch import (
    DOT_PRECISION,
    LOG2_E,
    ceil_div,
    contiguous_key_mask,
    lead_strides,
    or_stand_in,
    padded_head_dim,
)
from ...common.tokens import gather_mask

TILE_Q, TILE_K = 128, 64
"""The tiles; smaller blocks are summed inside one, larger blocks are sums of tiles. Wider key tiles were slower on
an H200, and so were tiles of 64 queries (8.5 ms for 7.5 at 32,768 tokens)."""


@triton.jit
def tile_logits(
    b_q,
    k_ptr,
    rows_ptr,
    mask_ptr,
    start,
    kv_len,
    stride_ks,
    stride_kd,
    scale,
    o_d,
    HAS_ROWS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    TAIL: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits of one tile in the log2 domain; hidden and missing keys get -inf."""
    slot = start + tl.arange(0, TILE)
    valid = slot < kv_len
    row = slot
    if HAS_ROWS:
        row = tl.load(rows_ptr + slot, mask=valid, other=0)
    p_k = k_ptr + row.to(tl.int64)[None, :] * stride_ks + o_d[:, None] * stride_kd
    if TAIL:
        b_k = tl.load(p_k, mask=valid[None, :] & (o_d < DIM)[:, None], other=0.0)
    elif DIM_PAD != DIM:
        b_k = tl.load(p_k, mask=(o_d < DIM)[:, None], other=0.0)
    else:
        b_k = tl.load(p_k)
    s = tl.dot(b_q, b_k, input_precision=PRECISION) * scale
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + row, mask=valid, other=0) != 0)
    if TAIL or HAS_MASK:
        s = tl.where(valid[None, :], s, float("-inf"))
    return s


@triton.jit
def store_masses(
    p_mass,
    p,
    first_q,
    first_k,
    nq,
    nk,
    FOLD_Q: tl.constexpr,
    FOLD_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Write the FOLD_Q x FOLD_K block sums of one tile of probabilities."""
    if FOLD_Q * FOLD_K == 1:
        tl.store(p_mass + first_q * nk + first_k, tl.sum(p))
    else:
        # Keys first: a row's logits of one block lie in few threads.
        part = tl.sum(tl.reshape(p, [TILE_Q, FOLD_K, TILE_K // FOLD_K]), 2)
        part = tl.sum(tl.reshape(part, [FOLD_Q, TILE_Q // FOLD_Q, FOLD_K]), 1)
        o_q = first_q + tl.arange(0, FOLD_Q)
        o_k = first_k + tl.arange(0, FOLD_K)
        tl.store(p_mass + o_q[:, None] * nk + o_k[None, :], part, mask=(o_q < nq)[:, None] & (o_k < nk)[None, :])


@triton.jit
def block_mass_fwd_kernel(
    q_ptr,
    k_ptr,
    rows_ptr,
    mask_ptr,
    clean_ptr,
    lse_ptr,
    mass_ptr,
    q_len,
    kv_len,
    heads,
    tiles,
    nq,
    nk,
    scale,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_kd,
    stride_rb,
    stride_rh,
    stride_mb,
    stride_cb,
    stride_ch,
    WRITE_LSE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    FOLD_Q: tl.constexpr,
    FOLD_K: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """With WRITE_LSE the log-sum-exp of TILE_Q queries, otherwise the mass of their FOLD_Q blocks in each of ``nk``."""
    # Query tiles of a head run together, so that they share its keys in the cache.
    pid = tl.program_id(0)
    i = pid % tiles
    h = (pid // tiles) % heads
    b = pid // (tiles * heads)
    o_d = tl.arange(0, DIM_PAD)
    slot = i * TILE_Q + tl.arange(0, TILE_Q)
    in_q = slot < q_len
    row = slot
    rows_ptr += b * stride_rb + h * stride_rh
    if HAS_ROWS:
        row = tl.load(rows_ptr + slot, mask=in_q, other=0)
    q_ptr += b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh
    k_ptr += b.to(tl.int64) * stride_kb + h.to(tl.int64) * stride_kh
    mask_ptr += b * stride_mb
    p_q = q_ptr + row.to(tl.int64)[:, None] * stride_qs + o_d[None, :] * stride_qd
    b_q = tl.load(p_q, mask=in_q[:, None] & (o_d < DIM)[None, :], other=0.0)
    p_lse = lse_ptr + (b.to(tl.int64) * heads + h) * q_len + row
    full = kv_len // TILE_K
    clean = full
    if HAS_MASK:
        # Reading the mask takes as long as half the product: tiles before the first hidden key do without.
        clean = tl.minimum(tl.load(clean_ptr + b * stride_cb + h * stride_ch), full)

    if WRITE_LSE:
        top = tl.full([TILE_Q], -1e30, tl.float32)
        total = tl.zeros([TILE_Q], tl.float32)
        for j in range(0, clean):
            s = tile_logits(
                b_q, k_ptr, rows_ptr, mask_ptr, j * TILE_K, kv_len, stride_ks, stride_kd, scale, o_d,
                HAS_ROWS, False, False, TILE_K, DIM, DIM_PAD, PRECISION,
            )  # fmt: skip
            new = tl.maximum(top, tl.max(s, 1))
            total = total * tl.exp2(top - new) + tl.sum(tl.exp2(s - new[:, None]), 1)
            top = new
        if HAS_MASK:
            for j in range(clean, full):
                s = tile_logits(
                    b_q, k_ptr, rows_ptr, mask_ptr, j * TILE_K, kv_len, stride_ks, stride_kd, scale, o_d,
                    HAS_ROWS, HAS_MASK, False, TILE_K, DIM, DIM_PAD, PRECISION,
                )  # fmt: skip
                new = tl.maximum(top, tl.max(s, 1))
                total = total * tl.exp2(top - new) + tl.sum(tl.exp2(s - new[:, None]), 1)
                top = new
        if full * TILE_K < kv_len:
            s = tile_logits(
                b_q, k_ptr, rows_ptr, mask_ptr, full * TILE_K, kv_len, stride_ks, stride_kd, scale, o_d,
                HAS_ROWS, HAS_MASK, True, TILE_K, DIM, DIM_PAD, PRECISION,
            )  # fmt: skip
            new = tl.maximum(top, tl.max(s, 1))
            total = total * tl.exp2(top - new) + tl.sum(tl.exp2(s - new[:, None]), 1)
            top = new
        log = (top + tl.log2(tl.maximum(total, 1e-37))) / 1.4426950408889634
        tl.store(p_lse, tl.where(total > 0.0, log, float("-inf")), mask=in_q)
    else:
        # Rows that do not exist or see nothing are sent to 2 ** -inf.
        lse = tl.load(p_lse, mask=in_q, other=float("inf")) * 1.4426950408889634
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        p_mass = mass_ptr + (b.to(tl.int64) * heads + h) * nq * nk
        for j in range(0, clean):
            s = tile_logits(
                b_q, k_ptr, rows_ptr, mask_ptr, j * TILE_K, kv_len, stride_ks, stride_kd, scale, o_d,
                HAS_ROWS, False, False, TILE_K, DIM, DIM_PAD, PRECISION,
            )  # fmt: skip
            p = tl.exp2(s - lse[:, None])
            store_masses(p_mass, p, i * FOLD_Q, j * FOLD_K, nq, nk, FOLD_Q, FOLD_K, TILE_Q, TILE_K)
        if HAS_MASK:
            for j in range(clean, full):
                s = tile_logits(
                    b_q, k_ptr, rows_ptr, mask_ptr, j * TILE_K, kv_len, stride_ks, stride_kd, scale, o_d,
                    HAS_ROWS, HAS_MASK, False, TILE_K, DIM, DIM_PAD, PRECISION,
                )  # fmt: skip
                p = tl.exp2(s - lse[:, None])
                store_masses(p_mass, p, i * FOLD_Q, j * FOLD_K, nq, nk, FOLD_Q, FOLD_K, TILE_Q, TILE_K)
        if full * TILE_K < kv_len:
            s = tile_logits(
                b_q, k_ptr, rows_ptr, mask_ptr, full * TILE_K, kv_len, stride_ks, stride_kd, scale, o_d,
                HAS_ROWS, HAS_MASK, True, TILE_K, DIM, DIM_PAD, PRECISION,
            )  # fmt: skip
            p = tl.exp2(s - lse[:, None])
            store_masses(p_mass, p, i * FOLD_Q, full * FOLD_K, nq, nk, FOLD_Q, FOLD_K, TILE_Q, TILE_K)


_BLOCK_MASS = KeptKernel(block_mass_fwd_kernel)


def block_mass_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    block_q: int,
    block_k: int,
    lse: torch.Tensor | None,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    scale: float,
    tile: tuple[int, int] = (TILE_Q, TILE_K),
    warps: int = 4,
    stages: int = 3,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`dit_accel.kernels.selection.block_mass.block_mass`."""
    batch, q_len, heads, dim = q.shape
    kv_len = k.shape[1]
    rows = None if rows is None else rows.contiguous()
    key_mask = contiguous_key_mask(key_mask, batch, kv_len)

    def launch(write_lse: bool, tile_q: int, tile_k: int, fold_q: int, fold_k: int) -> None:
        tiles = ceil_div(q_len, tile_q)
        with torch.cuda.device_of(q):
            _BLOCK_MASS[(batch * heads * tiles,)](
                q,
                k,
                or_stand_in(rows, q),
                or_stand_in(key_mask, q),
                or_stand_in(clean, q),
                lse,
                mass,
                q_len,
                kv_len,
                heads,
                tiles,
                *(mass.shape[2:] if mass is not None else (0, 0)),
                scale * LOG2_E,
                *q.stride(),
                *k.stride(),
                *lead_strides(rows),
                kv_len if key_mask is not None else 0,
                *lead_strides(clean),
                WRITE_LSE=write_lse,
                HAS_ROWS=rows is not None,
                HAS_MASK=key_mask is not None,
                TILE_Q=tile_q,
                TILE_K=tile_k,
                FOLD_Q=fold_q,
                FOLD_K=fold_k,
                DIM=dim,
                DIM_PAD=padded_head_dim(dim),
                PRECISION=DOT_PRECISION,
                num_warps=warps,
                num_stages=stages,
            )

    mass = None
    # Short sequences would leave most of a large tile empty.
    tile_q, tile_k = 16 if q_len <= 64 else tile[0], 16 if kv_len <= 32 else tile[1]
    clean = None if key_mask is None else _clean_tiles(key_mask, rows, tile_k)
    if lse is None:
        lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
        launch(True, tile_q, tile_k, 1, 1)
    else:
        lse = lse.float().contiguous()
    inside_q, inside_k = max(1, tile_q // block_q), max(1, tile_k // block_k)
    part_q, part_k = min(block_q, tile_q), min(block_k, tile_k)
    nq, nk = ceil_div(q_len, part_q), ceil_div(kv_len, part_k)
    mass = torch.empty(batch, heads, nq, nk, dtype=torch.float32, device=q.device)
    launch(False, tile_q, tile_k, inside_q, inside_k)
    fold_q, fold_k = block_q // part_q, block_k // part_k
    if fold_q > 1 or fold_k > 1:
        mass = torch.nn.functional.pad(mass, (0, -nk % fold_k, 0, -nq % fold_q))
        mass = mass.unflatten(2, (-1, fold_q)).unflatten(-1, (-1, fold_k)).sum((3, 5))
    return mass, lse


def _clean_tiles(key_mask: torch.Tensor, rows: torch.Tensor | None, tile: int) -> torch.Tensor:
    """int32 ``[B, H|1]``: tiles of key slots before the first one with a hidden key."""
    hidden = ~gather_mask(key_mask, rows)
    some = torch.nn.functional.pad(hidden, (0, -hidden.shape[-1] % tile)).unflatten(-1, (-1, tile)).any(-1)
    return (~some).to(torch.int32).cumprod(-1).sum(-1, dtype=torch.int32)
