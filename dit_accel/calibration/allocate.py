"""Errors of heads by density, and how a budget of blocks is shared out by them."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch


@dataclass(frozen=True, eq=False)
class HeadErrors:
    """What each head's sparsity does to the velocity.

    Attributes:
        densities: asked of the recipe, rising to 1.
        kept: float64 ``[layers, heads, densities]``: what the recipe then kept, own and rounded-up blocks included.
        error: float64 ``[layers, heads, densities]``: mean squared norm of what a head at this density changes in
            the velocity, alone, as a share of the velocity's own squared norm; in the best order there.
        orders: the orders that heads may choose from; empty where the recipe's own serves all.
        by_order: float64 ``[orders, layers, heads, densities]``, the errors in each of them.
    """

    densities: tuple[float, ...]
    kept: torch.Tensor
    error: torch.Tensor
    orders: tuple[str, ...] = ()
    by_order: torch.Tensor | None = None

    def predicted(self, head_densities: Sequence[Sequence[float]]) -> float:
        """Relative error of the velocity if errors of single heads added up as independent ones do."""
        return max(sum(self._at(self.error, head_densities)), 0.0) ** 0.5

    def kept_at(self, head_densities: Sequence[Sequence[float]]) -> float:
        """Mean density that the recipe would really keep."""
        found = self._at(self.kept, head_densities)
        return sum(found) / len(found)

    def best_orders(self, head_densities: Sequence[Sequence[float]]) -> tuple[tuple[str, ...], ...]:
        """The order of every head with the least error at its density; the first one named where orders tie."""
        assert self.by_order is not None
        each = torch.tensor([self._at(curves, head_densities) for curves in self.by_order])
        names = [self.orders[int(place)] for place in each.argmin(0)]
        heads = len(head_densities[0])
        return tuple(tuple(names[first : first + heads]) for first in range(0, len(names), heads))

    def _at(self, curves: torch.Tensor, head_densities: Sequence[Sequence[float]]) -> list[float]:
        return [
            _interpolate(self.densities, curve, density)
            for row, densities in zip(curves.tolist(), head_densities, strict=True)
            for curve, density in zip(row, densities, strict=True)
        ]


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
    hulls = {
        (layer, head): _hull(errors.densities, errors.kept[layer, head].tolist(), errors.error[layer, head].tolist())
        for layer, head in product(range(layers), range(heads))
    }
    lowest = sum(hull[0].kept for hull in hulls.values()) / len(hulls)
    check_reach(lowest, mean_density)
    chosen = [[hulls[layer, head][0].asked for head in range(heads)] for layer in range(layers)]
    queue = [(_slope(hull, 0), layer, head, 0) for (layer, head), hull in hulls.items() if len(hull) > 1]
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
            heapq.heappush(queue, (_slope(hulls[layer, head], place + 1), layer, head, place + 1))
    return tuple(tuple(round(share, 6) for share in row) for row in chosen)


def check_target(mean_density: float | None, max_error: float | None) -> None:
    """Raise unless one of the two targets of :func:`allocate` is given, and may be reached by some recipe."""
    if (mean_density is None) == (max_error is None):
        raise ValueError(f"give mean_density or max_error, got {mean_density} and {max_error}.")
    if mean_density is not None and not 0.0 < mean_density <= 1.0:
        raise ValueError(f"mean_density must lie in (0, 1], got {mean_density}.")
    if max_error is not None and max_error <= 0.0:
        raise ValueError(f"max_error must be above 0, got {max_error}.")


def check_reach(lowest: float, mean_density: float | None) -> None:
    """Raise if a mean density is below the lowest that a recipe keeps: own and rounded-up blocks count."""
    if mean_density is not None and not lowest <= mean_density <= 1.0:
        raise ValueError(f"mean_density must lie in [{lowest:.4f}, 1], got {mean_density}.")


def uniform_shares(errors: HeadErrors, kept: float) -> list[list[float]]:
    """One density for all heads that keeps this share of the blocks."""
    layers, heads, _ = errors.error.shape
    low, high = errors.densities[0], 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if errors.kept_at([[middle] * heads] * layers) < kept else (low, middle)
    return [[high] * heads] * layers


@dataclass(frozen=True)
class _Point:
    """One density of a head: asked, kept, and its error."""

    asked: float
    kept: float
    error: float


def _hull(asked: Sequence[float], kept: Sequence[float], errors: Sequence[float]) -> list[_Point]:
    """The lower convex hull of a falling curve, from its first point to its lowest."""
    points: list[_Point] = []
    for point in map(_Point, asked, kept, errors):
        if points and (point.error >= points[-1].error or point.kept <= points[-1].kept):
            continue  # more blocks that do not help are no choice
        while len(points) > 1 and _rise(points[-2], points[-1]) >= _rise(points[-1], point):
            points.pop()
        points.append(point)
    return points


def _rise(left: _Point, right: _Point) -> float:
    return (right.error - left.error) / (right.kept - left.kept)


def _slope(hull: list[_Point], place: int) -> float:
    return _rise(*hull[place : place + 2])


def _interpolate(densities: Sequence[float], curve: Sequence[float], density: float) -> float:
    for left in range(len(densities) - 1):
        if density <= densities[left + 1]:
            share = (density - densities[left]) / (densities[left + 1] - densities[left])
            return curve[left] + max(share, 0.0) * (curve[left + 1] - curve[left])
    return curve[-1]
