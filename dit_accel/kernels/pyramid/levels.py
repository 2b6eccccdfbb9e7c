"""Levels of a pyramid of keys: which level a block gets, and the means that a level reads (PSA, ziplab)."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from ..common.capability import why_not_kernels
from ..common.choice import Case, choose
from ..common.tokens import gather_rows

LEVELS = (1, 2, 4, 8)


def energy_levels(
    importance: torch.Tensor, cumulative: tuple[float, float, float, float], min_full: float = 0.06
) -> torch.Tensor:
    """Levels by energy: blocks up to ``cumulative[0]`` of a row's total importance get level 1, and so on.

    Args:
        importance: ``[B, H, nq, nk]``, not negative. The block that crosses a bound has the finer level.
        cumulative: non-decreasing; PSA for Wan2.1-14B: (.4, .5, .6, .8).
        min_full: share of the blocks that have level 1 in any case.

    Returns:
        int8 ``[B, H, nq, nk]`` of 0, 1, 2, 4, 8.
    """
    check_cumulative(cumulative)
    nk = importance.shape[-1]
    value, order = importance.float().sort(dim=-1, descending=True, stable=True)
    before = (value.cumsum(-1) - value) / value.sum(-1, keepdim=True)
    within = [before < share for share in cumulative]
    within[0][..., : max(1, -(-round(min_full * 1_000_000) * nk // 1_000_000))] = True
    # Levels of the sorted blocks, put back where the blocks came from: no second sort.
    levels = levels_from_rank(before, within)
    return torch.empty_like(levels).scatter_(-1, order, levels)


def check_cumulative(cumulative: tuple[float, float, float, float]) -> None:
    """Four non-decreasing shares in [0, 1]."""
    bounds = (0.0, *cumulative, 1.0)
    if len(cumulative) != 4 or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"cumulative must be four non-decreasing shares in [0, 1], got {cumulative}.")


def levels_from_rank(rank: torch.Tensor, within: list[torch.Tensor]) -> torch.Tensor:
    """The finest level whose condition holds, else 0, in the shape of ``rank``."""
    levels = torch.zeros_like(rank, dtype=torch.int8)
    for level, inside in reversed(list(zip(LEVELS, within))):
        levels = torch.where(inside, level, levels)
    return levels.to(torch.int8)


def similarity_cap(
    k: torch.Tensor,
    block: int,
    *,
    rows: torch.Tensor | None = None,
    thresholds: tuple[float, float, float] = (0.7, 0.65, 0.6),
    backend: str = "auto",
) -> torch.Tensor:
    """The coarsest level that the keys of a block are similar enough for: int8 ``[B, H, nk]``.

    Level L of 2, 4, 8 needs a mean cosine over the block's runs of L, between a run's first and last token,
    above its threshold, and the levels before it too. Apply it as ``levels.minimum(cap[:, :, None])``.
    """
    case = Case(k.device)
    why_not = why_not_kernels(case)
    if why_not is None and (block < LEVELS[-1] or block & (block - 1)):
        why_not = f"the triton kernel takes blocks of a power of two from {LEVELS[-1]}, got {block}"
    if choose("selection", backend, case, why_not).name == "triton":
        from ..selection.triton.spread import similarity_cap_triton

        return similarity_cap_triton(k, block, rows=rows, thresholds=thresholds)
    k = F.normalize(gather_rows(k, rows).float(), dim=-1)
    k = F.pad(k, (0, 0, 0, -k.shape[2] % block)).unflatten(2, (-1, block))
    cap = torch.ones(k.shape[:3], dtype=torch.int8, device=k.device)
    open_ = torch.ones_like(cap, dtype=torch.bool)
    for level, threshold in zip(LEVELS[1:], thresholds):
        first, last = k[..., ::level, :], k[..., level - 1 :: level, :]
        # Runs that the end of the sequence cuts have cosine 0 with padding; they are left out of the mean.
        whole = (last.square().sum(-1) > 0).sum(-1).clamp(min=1)
        open_ = open_ & ((first * last).sum((-1, -2)) / whole > threshold)
        cap = torch.where(open_, level, cap).to(torch.int8)
    return cap


def pool_level(x: torch.Tensor, visible: torch.Tensor | None, level: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means over runs of ``level`` slots of x ``[B, H, S, D]`` and the number of tokens in each."""
    seq = x.shape[2]
    seen = torch.ones(1, 1, seq, dtype=torch.bool, device=x.device) if visible is None else visible
    x = torch.where(seen[..., None], x, torch.zeros((), dtype=x.dtype, device=x.device))
    pad = -seq % level
    total = F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, level)).sum(3)
    count = F.pad(seen, (0, pad)).unflatten(-1, (-1, level)).sum(-1)
    return total / count.clamp(min=1)[..., None], count
