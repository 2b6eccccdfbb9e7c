"""Pyramid levels of key blocks: at which resolution a query block reads each key block (PSA).

A level is the number of neighbouring keys that are averaged into one: 1 reads every key, 8 every eighth mean,
0 skips the block. The functions here assign levels; an attention kernel that reads averaged keys, with
``log(level)`` added to their logits, has to go with them. Pyramid Sparse Attention, ziplab.
"""

from __future__ import annotations

import math

import torch

from ..kernels.selection import gather_rows

LEVELS = (1, 2, 4, 8)


def sampled_importance(
    q: torch.Tensor,
    k: torch.Tensor,
    block_q: int,
    block_k: int,
    *,
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    share: float = 0.25,
    seed: int = 0,
) -> torch.Tensor:
    """Mass between a random sample of queries and keys, by block: float32 ``[B, H, nq, nk]``.

    Args:
        q, k: ``[B, S, H, D]``.
        rows, key_mask, scale: as everywhere.
        share: sampled share of a block's tokens; the same places in every block.
        seed: of the sample.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    seq_len = q.shape[1]
    slots_q, slots_k = _sample(seq_len, block_q, share, seed), _sample(seq_len, block_k, share, seed)
    slots_q, slots_k = slots_q.to(q.device), slots_k.to(q.device)
    queries = gather_rows(q, slots_q[None, None] if rows is None else rows[..., slots_q])
    keys = gather_rows(k, slots_k[None, None] if rows is None else rows[..., slots_k])
    logits = (queries.float() * scale) @ keys.float().transpose(-1, -2)
    if key_mask is not None:
        visible = key_mask[:, None].expand(-1, 1 if rows is None else rows.shape[1], -1)
        index = slots_k[None, None] if rows is None else rows[..., slots_k].long()
        logits = logits.masked_fill(~torch.take_along_dim(visible, index, dim=2)[:, :, None], -torch.inf)
    mass = torch.nan_to_num(logits.softmax(-1))
    nq, nk = -(-seq_len // block_q), -(-seq_len // block_k)
    to_q = torch.nn.functional.one_hot(slots_q // block_q, nq).float()
    to_k = torch.nn.functional.one_hot(slots_k // block_k, nk).float()
    return to_q.T @ mass @ to_k


def _sample(seq_len: int, block: int, share: float, seed: int) -> torch.Tensor:
    places = torch.randperm(block, generator=torch.Generator().manual_seed(seed))
    kept = places[: max(1, round(share * block))].sort().values
    slots = (torch.arange(0, seq_len, block)[:, None] + kept).flatten()
    # A short last block may hold none of the places: then its first token speaks for it.
    last = (seq_len - 1) // block * block
    slots = slots[slots < seq_len]
    return slots if bool((slots >= last).any()) else torch.cat([slots, torch.tensor([last])])


def levels_by_energy(
    importance: torch.Tensor,
    candidates: torch.Tensor,
    bounds: tuple[float, float, float, float] = (0.5, 0.6, 0.7, 0.8),
    min_full: float = 0.06,
) -> torch.Tensor:
    """Level of every block pair, by where its importance falls in the cumulative energy of its row.

    Args:
        importance: ``[B, H, nq, nk]``, not negative.
        candidates: bool ``[B|1, H|1, nk]``: key blocks that take part; all others get level 0.
        bounds: cumulative energy up to which a block has level 1, 2, 4 and 8; beyond the last it is skipped.
            A block's place is the energy of the blocks before it, so the most important one has level 1.
        min_full: least share of the candidates with level 1.

    Returns:
        uint8 ``[B, H, nq, nk]`` of 0, 1, 2, 4 or 8.
    """
    ranked, order = _ranked(importance, candidates)
    energy = ranked.clamp_min(0.0).double()
    before = (energy.cumsum(-1) - energy) / energy.sum(-1, keepdim=True).clamp_min(1e-300)
    level = torch.zeros_like(order, dtype=torch.uint8)
    for value, bound in reversed(list(zip(LEVELS, bounds, strict=True))):
        level = torch.where(before < bound, value, level)
    full = torch.ceil(candidates.sum(-1, keepdim=True)[..., None, :] * min_full - 1e-6)
    rank = torch.arange(order.shape[-1], device=order.device)
    level = torch.where(rank < full, 1, level)
    return _scatter(level, order, ranked)


def levels_by_quota(
    importance: torch.Tensor,
    candidates: torch.Tensor,
    quotas: tuple[float, float, float, float] = (0.05, 0.1, 0.15, 0.25),
    tile: int = 32,
    block: int = 128,
) -> torch.Tensor:
    """Level of every block pair, by its rank in its row.

    Args:
        importance, candidates: see :func:`levels_by_energy`.
        quotas: cumulative shares of the candidates with level at most 1, 2, 4 and 8; the rest is skipped.
        tile, block: keys of a hardware tile and of a block. The number of blocks of a level L is rounded up
            to a multiple of ``ceil(L / (block / tile))``, so that their averaged keys fill whole tiles.

    Returns:
        uint8 ``[B, H, nq, nk]``.
    """
    ranked, order = _ranked(importance, candidates)
    count = candidates.sum(-1, keepdim=True)[..., None, :].double()
    rank = torch.arange(order.shape[-1], device=order.device)
    level = torch.zeros_like(order, dtype=torch.uint8)
    begin, reached = torch.zeros_like(count), 0.0
    for value, quota in zip(LEVELS, quotas, strict=True):
        group = math.ceil(value * tile / block)
        wanted = torch.ceil(count * (quota - reached) - 1e-6)
        wanted = torch.ceil(wanted / group) * group
        level = torch.where((rank >= begin) & (rank < begin + wanted), value, level)
        begin, reached = begin + wanted, quota
    return _scatter(level, order, ranked)


def levels_by_similarity(
    k: torch.Tensor, block: int, bounds: tuple[float, float, float] = (0.7, 0.65, 0.6)
) -> torch.Tensor:
    """Coarsest level that the likeness of a block's keys allows: uint8 ``[B, H, nk]`` of 1, 2, 4 or 8.

    A level of L averages groups of L keys. It is allowed while the mean cosine between the first and the last
    key of the groups exceeds its bound, and the level before is allowed too. Keys are given in slot order,
    ``[B, H, S, D]``; groups that a short last block cuts do not count.
    """
    unit = torch.nn.functional.normalize(k.float(), dim=-1)
    level = torch.ones(*k.shape[:2], -(-k.shape[2] // block), dtype=torch.uint8, device=k.device)
    allowed = torch.ones_like(level, dtype=torch.bool)
    for value, bound in zip(LEVELS[1:], bounds, strict=True):
        groups = k.shape[2] // value
        pairs = unit[:, :, : groups * value].unflatten(2, (groups, value))
        cosine = (pairs[..., 0, :] * pairs[..., -1, :]).sum(-1)
        owner = torch.arange(groups, device=k.device) * value // block
        count = torch.zeros_like(level[0, 0], dtype=torch.float32).index_add_(
            0, owner, torch.ones_like(owner, dtype=torch.float32)
        )
        total = torch.zeros_like(level, dtype=torch.float32).index_add_(2, owner, cosine)
        allowed = allowed & (total > bound * count) & (count > 0)
        level = torch.where(allowed, value, level)
    return level


def finer(level: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """The finer of a pair's level ``[B, H, nq, nk]`` and its key block's ``[B, H, nk]``; skipped stays so."""
    return torch.minimum(level, allowed[..., None, :])


def _ranked(importance: torch.Tensor, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shown = importance.masked_fill(~candidates[..., None, :], -1.0)
    ranked, order = shown.sort(dim=-1, descending=True, stable=True)
    return ranked, order


def _scatter(level: torch.Tensor, order: torch.Tensor, ranked: torch.Tensor) -> torch.Tensor:
    level = level.to(torch.uint8).expand(order.shape).masked_fill(ranked < 0, 0)
    return torch.zeros_like(order, dtype=torch.uint8).scatter_(-1, order, level)
