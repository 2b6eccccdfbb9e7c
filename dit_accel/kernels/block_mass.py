"""Exact attention mass of every block pair, streamed: the search step of AdaSpa (arXiv 2502.21079)."""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F

from .capability import why_not_tiles
from .choice import Case, Choice, case_of, choose
from .selection import gather_mask, gather_rows

CHUNK_LOGITS = 1 << 20
"""The torch version holds about this many logits at a time, of one head."""


def choose_block_mass(case: Case, backend: str = "auto") -> Choice:
    """The backend of :func:`block_mass`; raises a ValueError if it is refused."""
    return choose("block_mass", backend, case, why_not_tiles(case))


def block_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    block_q: int,
    block_k: int,
    lse: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    k_rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax probability summed over each block pair, and the log-sum-exp it was normalised with.

    ``mass[I, J]`` is the sum over queries i of block I and keys j of block J of
    ``exp(scale * q_i . k_j - lse_i)``, so with an exact ``lse`` the masses of a row of blocks add up to the
    number of its queries. One pass over the logits with ``lse`` given, two without; no S×S tensor. Passing
    the ``lse`` of an earlier denoising step is AdaSpa's cached search. (The paper's listing prints Log for
    exp.)

    Args:
        q, k: ``[B, Sq, H, D]`` and ``[B, Sk, H, D]``, any strides.
        block_q, block_k: tokens in a query and in a key block; powers of two from 16 for Triton.
        lse: optional float32 ``[B, H, Sq]``, natural logarithm, in the queries' original order.
        rows, k_rows: optional permutations of queries and keys (the queries' one when ``k_rows`` is left
            out), see :func:`dit_accel.kernels.selection.pool_blocks`.
        key_mask: optional bool ``[B, Sk]``, visible keys in original order.
        scale: softmax scale, ``D ** -0.5`` when left out.
        backend: one of :data:`~dit_accel.kernels.BACKENDS`; ``"auto"`` is Triton on CUDA.

    Returns:
        ``(mass, lse)``: float32 ``[B, H, nq, nk]``, and ``[B, H, Sq]`` in original order. A query that sees
        no key has ``lse`` -inf and contributes no mass.
    """
    if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"q and k must agree in batch, heads and head dim, got {tuple(q.shape)} and {tuple(k.shape)}.")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k_rows = rows if k_rows is None else k_rows
    if choose_block_mass(case_of(q, k, blocks=(block_q, block_k)), backend).name == "triton":
        from .portable.block_mass import block_mass_triton

        return block_mass_triton(
            q, k, block_q=block_q, block_k=block_k, lse=lse, rows=rows, k_rows=k_rows, key_mask=key_mask,
            scale=scale,
        )  # fmt: skip
    return _block_mass_torch(q, k, block_q, block_k, lse, rows, k_rows, key_mask, scale)


def _block_mass_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    block_q: int,
    block_k: int,
    lse: torch.Tensor | None,
    rows: torch.Tensor | None,
    k_rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, q_len, heads, _ = q.shape
    kv_len = k.shape[1]
    hidden = None if key_mask is None else ~gather_mask(key_mask, k_rows).expand(batch, heads, kv_len)
    given = None
    if lse is not None:
        given = lse.to(wide) if rows is None else torch.take_along_dim(lse.to(wide), rows.long(), dim=2)
    q_slots, k_slots = (gather_rows(x, places) for x, places in ((q, rows), (k, k_rows)))
    nq, nk = -(-q_len // block_q), -(-kv_len // block_k)
    mass = torch.zeros(batch, heads, nq, nk, dtype=torch.float32, device=q.device)
    slots = torch.empty(batch, heads, q_len, dtype=wide, device=q.device)
    blocks = max(1, CHUNK_LOGITS // (block_q * kv_len))
    # Head by head in few rows: what a processor's caches hold.
    for b, h in product(range(batch), range(heads)):
        queries, keys = q_slots[b, h].to(wide) * scale, k_slots[b, h].to(wide).T
        for first in range(0, nq, blocks):
            part = slice(first * block_q, min((first + blocks) * block_q, q_len))
            logits = queries[part] @ keys
            if hidden is not None:
                logits.masked_fill_(hidden[b, h], -torch.inf)
            shift = logits.amax(-1) if given is None else given[b, h, part]
            # A query without visible keys: exp(-inf - inf) is 0, exp(-inf + inf) would be NaN.
            shift = shift.masked_fill(shift == -torch.inf, torch.inf)
            weights = logits.sub_(shift[:, None]).exp_()
            if kv_len % block_k:
                weights = F.pad(weights, (0, -kv_len % block_k))
            rows_mass = weights.view(-1, nk, block_k).sum(-1)
            if given is None:
                total = rows_mass.sum(-1)
                slots[b, h, part] = torch.where(total == 0, -torch.inf, shift + total.log())
                rows_mass = rows_mass * torch.where(total == 0, 0.0, total.reciprocal())[:, None]
            rows_mass = F.pad(rows_mass, (0, 0, 0, -rows_mass.shape[0] % block_q))
            mass[b, h, first : first + blocks] = rows_mass.view(-1, block_q, nk).sum(1)
    if lse is not None:
        return mass, lse
    if rows is None:
        return mass, slots.float()
    index = rows.long().expand(batch, heads, q_len)
    return mass, torch.empty_like(slots, dtype=torch.float32).scatter_(2, index, slots.float())
