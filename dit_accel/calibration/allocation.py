"""How to share a budget of blocks among heads, by their measured errors."""

from __future__ import annotations

import heapq
from itertools import product

from .head_errors import HeadErrors, check_reachable
from .hull import lower_hull, slope


def allocate(
    errors: HeadErrors, *, mean_density: float | None = None, max_error: float | None = None
) -> tuple[tuple[float, ...], ...]:
    """Densities per layer and head with the least predicted error: greedy on each head's convex hull.

    On convex curves the greedy choice, always the steepest fall of error per block, is optimal. Every head begins
    at the lowest density measured.

    Args:
        mean_density: over all heads, to spend.
        max_error: relative error of the velocity to come down to, with as few blocks as possible.

    Returns:
        ``head_densities`` of a selection.

    Raises:
        ValueError: neither or both targets, or a mean density below the lowest measured.
    """
    check_target(mean_density, max_error)
    layers, heads, _ = errors.error.shape
    kept, error = errors.kept.tolist(), errors.error.tolist()
    hulls = {
        (layer, head): lower_hull(errors.densities, kept[layer][head], error[layer][head])
        for layer, head in product(range(layers), range(heads))
    }
    lowest = sum(hull[0].kept for hull in hulls.values()) / len(hulls)
    check_reachable(mean_density, lowest)
    chosen = [[hulls[layer, head][0].asked for head in range(heads)] for layer in range(layers)]
    queue = [(slope(hull, 0), layer, head, 0) for (layer, head), hull in hulls.items() if len(hull) > 1]
    heapq.heapify(queue)
    budget = None if mean_density is None else (mean_density - lowest) * layers * heads
    left = sum(hull[0].error for hull in hulls.values())
    goal = 0.0 if max_error is None else max_error**2
    while queue:
        _, layer, head, place = heapq.heappop(queue)
        here, there = hulls[layer, head][place : place + 2]
        share, gain = 1.0, here.error - there.error
        if budget is not None:
            share = min(1.0, budget / (there.kept - here.kept))
            budget -= share * (there.kept - here.kept)
        elif left - goal < gain:
            share = max(0.0, (left - goal) / gain)
        chosen[layer][head] = here.asked + share * (there.asked - here.asked)
        left -= share * gain
        if share < 1.0:
            break
        if place + 2 < len(hulls[layer, head]):
            heapq.heappush(queue, (slope(hulls[layer, head], place + 1), layer, head, place + 1))
    return tuple(tuple(round(share, 6) for share in row) for row in chosen)


def check_target(mean_density: float | None, max_error: float | None) -> None:
    """Raise ValueError where neither or both targets are given, or one that cannot be."""
    if (mean_density is None) == (max_error is None):
        raise ValueError(f"give mean_density or max_error, got {mean_density} and {max_error}.")
    if mean_density is not None and not 0.0 < mean_density <= 1.0:
        raise ValueError(f"mean_density must lie in (0, 1], got {mean_density}.")
    if max_error is not None and not 0.0 < max_error < float("inf"):
        raise ValueError(f"max_error must be above 0 and finite, got {max_error}.")
