"""A space-filling curve through the latent grid."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from ...layout import TokenLayout
from .protocol import Order
from .simple import whole_sequence

Vector = tuple[int, int, int]


@dataclass(frozen=True)
class Curve(Order):
    """A generalised Hilbert curve: neighbours in the sequence are neighbours on the grid, on any grid.

    Every run of consecutive tokens, hence every block, is compact in all three dimensions, wherever it
    starts and at any block size. Used by PSA, Rectified SpaAttn (arXiv 2511.19835) and Jenga (2505.16864). A
    step goes to an adjacent token, except that a box with an odd side costs a diagonal step here and there.
    The construction is J. Cerveny's generalisation of Hilbert's curve to boxes of any size.

    Attributes:
        first_frame_apart: the first frame is a segment with a curve of its own, and the other frames follow. A
            selection that always reads it then reads the blocks of one frame (Rectified SpaAttn), where one curve
            spreads its tokens over a quarter of the blocks of 21 frames.
    """

    first_frame_apart: bool = False

    def rows(self, layout: TokenLayout, device: torch.device, _layer: int = 0) -> torch.Tensor | None:
        return whole_sequence(layout, partial(self._of_grid, device=device))

    def _of_grid(self, grid: Vector, device: torch.device) -> torch.Tensor:
        frames, height, width = grid
        if not self.first_frame_apart or frames == 1:
            return _curve_order(grid, device)
        rest = _curve_order((frames - 1, height, width), device) + height * width
        return torch.cat([_curve_order((1, height, width), device), rest])


def _curve_order(grid: Vector, device: torch.device) -> torch.Tensor:
    points = torch.tensor(list(hilbert_points(grid)), device=device)
    return (points[:, 0] * grid[1] + points[:, 1]) * grid[2] + points[:, 2]


def hilbert_points(grid: Vector) -> Iterator[Vector]:
    """The grid's points along the curve, which starts at the origin.

    The box is walked along its longest side: its three edges are vectors (forward, and two across), the walk
    ends at the far end of ``forward``, and a box is cut into smaller ones whose walks join end to start.
    """
    edges = [(grid[0], 0, 0), (0, grid[1], 0), (0, 0, grid[2])]
    # Longest side forward, the others across in decreasing length.
    forward, across, deep = sorted(edges, key=lambda edge: -sum(edge))
    yield from _walk((0, 0, 0), forward, across, deep)


def _walk(start: Vector, forward: Vector, across: Vector, deep: Vector) -> Iterator[Vector]:
    length, breadth, depth = _size(forward), _size(across), _size(deep)
    if min(breadth, depth) == 1 == max(breadth, depth):
        yield from _line(start, forward)
    elif length == depth == 1:
        yield from _line(start, across)
    elif length == breadth == 1:
        yield from _line(start, deep)
    else:
        for box in _parts(start, forward, across, deep):
            if all(map(_size, box[1:])):
                yield from _walk(*box)


def _parts(start: Vector, forward: Vector, across: Vector, deep: Vector) -> list[tuple[Vector, Vector, Vector, Vector]]:
    length, breadth, depth = _size(forward), _size(across), _size(deep)
    half_f, half_a, half_d = _half(forward), _half(across), _half(deep)
    rest_f, rest_a, rest_d = _minus(forward, half_f), _minus(across, half_a), _minus(deep, half_d)
    end = _plus(start, _minus(forward, _unit(forward)))  # last token of the forward edge
    if 2 * length > 3 * breadth and 2 * length > 3 * depth:
        # A long box: two boxes, one after the other.
        return [(start, half_f, across, deep), (_plus(start, half_f), rest_f, across, deep)]
    turn_a = _minus(half_a, _unit(across))  # to the last token of the first half across
    turn_d = _minus(half_d, _unit(deep))
    if 3 * breadth > 4 * depth:
        # A flat box: up one side, over the far half, down the other side.
        return [
            (start, half_a, deep, half_f),
            (_plus(start, half_a), forward, rest_a, deep),
            (_plus(end, turn_a), _minus(half_a), deep, _minus(rest_f)),
        ]
    if 3 * depth > 4 * breadth:
        return [
            (start, half_d, half_f, across),
            (_plus(start, half_d), forward, across, rest_d),
            (_plus(end, turn_d), _minus(half_d), _minus(rest_f), across),
        ]
    # A cube-like box: five boxes, as in Hilbert's curve with its middle quarters joined in pairs.
    far_d = _minus(deep, _unit(deep))
    return [
        (start, half_a, half_d, half_f),
        (_plus(start, half_a), deep, half_f, rest_a),
        (_plus(_plus(start, turn_a), far_d), forward, _minus(half_a), _minus(rest_d)),
        (_plus(_plus(end, half_a), far_d), _minus(deep), _minus(rest_f), rest_a),
        (_plus(end, turn_a), _minus(half_a), half_d, _minus(rest_f)),
    ]


def _line(start: Vector, edge: Vector) -> Iterator[Vector]:
    unit = _unit(edge)
    for n in range(_size(edge)):
        yield start[0] + n * unit[0], start[1] + n * unit[1], start[2] + n * unit[2]


def _half(edge: Vector) -> Vector:
    """About half of an edge, of even length where it can be: only even sides join without a diagonal step."""
    size = _size(edge)
    half = size // 2
    if half % 2 and size > 2:
        half += 1
    unit = _unit(edge)
    return unit[0] * half, unit[1] * half, unit[2] * half


def _size(edge: Vector) -> int:
    return abs(edge[0] + edge[1] + edge[2])


def _unit(edge: Vector) -> Vector:
    x, y, z = edge
    return (x > 0) - (x < 0), (y > 0) - (y < 0), (z > 0) - (z < 0)


def _plus(a: Vector, b: Vector) -> Vector:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def _minus(a: Vector, b: Vector | None = None) -> Vector:
    """``a - b``, or ``-a``."""
    return (-a[0], -a[1], -a[2]) if b is None else (a[0] - b[0], a[1] - b[1], a[2] - b[2])
