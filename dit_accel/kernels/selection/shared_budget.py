"""The best pairs of blocks of many rows together: one budget for a head, or for all heads of a layer."""

from __future__ import annotations

import torch

from ..common.shares import PPM, share_in_ppm

BITS = 31
"""Of a float32 that is not negative: its order is that of its bits as an integer."""
KEPT = (1 << BITS) - 1


def best_of_all(
    scores: torch.Tensor,
    allowed: torch.Tensor,
    always: torch.Tensor,
    density: float | torch.Tensor,
    across_heads: bool,
) -> torch.Tensor:
    """The pairs with the largest scores, as many as ``select_blocks`` takes row by row.

    Pairs that are ``always`` kept count in the budget, and so does the best pair of each row, which is kept too: no
    row is left with nothing to read. Ties go to the lower head, row and column. Nothing waits for the device, and
    nothing is sorted: the least kept score is found bit by bit.

    Args:
        scores: float ``[B, H, nq, nk]``, not negative; a NaN ranks last.
        allowed: bool ``[B|1, H|1, nq|1, nk]``, pairs to choose from.
        always: bool, likewise, pairs that are chosen in any case; they must be allowed.
        density: share of the allowed pairs, or one per head, see ``select_blocks``.
        across_heads: one budget for all heads of a batch item in place of one per head.

    Returns:
        bool ``[B, H, nq, nk]``.
    """
    allowed = allowed.expand(scores.shape)
    scores = torch.nan_to_num(scores.float(), nan=0.0, posinf=torch.finfo(torch.float32).max).clamp_min(0.0)
    ranked = torch.where(allowed, scores, -1.0)
    best = torch.zeros_like(allowed).scatter_(-1, ranked.argmax(-1, keepdim=True), True)
    key = torch.where(always | best, KEPT, scores.view(torch.int32))
    key = torch.where(allowed, key, -1)
    ppm = share_in_ppm(density, "density", scores.device)
    ppm = ppm[..., None] if isinstance(ppm, torch.Tensor) else ppm
    count = (allowed.sum(-1, dtype=torch.int64) * ppm + (PPM - 1)) // PPM
    groups = 1 if across_heads else 2
    count = count.flatten(groups).sum(-1, keepdim=True)
    flat = key.flatten(groups)
    # The largest value that at least so many keys reach.
    least = torch.zeros_like(count, dtype=torch.int32)
    for bit in reversed(range(BITS)):
        higher = least | (1 << bit)
        reached = (flat >= higher).sum(-1, keepdim=True)
        least = torch.where(reached >= count, higher, least)
    above = flat > least
    ties = flat == least
    chosen = above | (ties & (ties.cumsum(-1, dtype=torch.int32) <= count - above.sum(-1, keepdim=True)))
    return chosen.view(scores.shape) | (always.expand(scores.shape) & allowed) | (best & allowed)
