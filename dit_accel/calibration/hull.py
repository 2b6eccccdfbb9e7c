"""A head's error as a curve over densities: its lower convex hull, and values between those measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """One density of a head: asked, kept, and its error."""

    asked: float
    kept: float
    error: float


def lower_hull(asked: Sequence[float], kept: Sequence[float], errors: Sequence[float]) -> list[Point]:
    """The lower convex hull of a falling curve, from its first point to its lowest."""
    points: list[Point] = []
    for point in map(Point, asked, kept, errors):
        if points and (point.error >= points[-1].error or point.kept <= points[-1].kept):
            continue  # more blocks that do not help are no choice
        while len(points) > 1 and _rise(points[-2], points[-1]) >= _rise(points[-1], point):
            points.pop()
        points.append(point)
    return points


def _rise(left: Point, right: Point) -> float:
    return (right.error - left.error) / (right.kept - left.kept)


def slope(hull: list[Point], place: int) -> float:
    """Rise of a hull from a point to the next; below 0."""
    return _rise(*hull[place : place + 2])


def interpolate(densities: Sequence[float], curve: Sequence[float], density: float) -> float:
    """The value at a density, straight between those measured and level beyond them."""
    for left in range(len(densities) - 1):
        if density <= densities[left + 1]:
            share = (density - densities[left]) / (densities[left + 1] - densities[left])
            return curve[left] + max(share, 0.0) * (curve[left + 1] - curve[left])
    return curve[-1]
