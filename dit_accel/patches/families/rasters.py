"""Latent grids read off the positions of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod

import torch

from ...layout import Grid, LatentGrid

LEAST_REFERENCE = 16


def images(ids: torch.Tensor) -> list[LatentGrid]:
    """The images of a packed stream, from (image, row, column, ...) of each token, in any unit.

    The one with the smallest number, which is what is generated, then the others in the stream's order.

    Args:
        ids: ``[N, 3 or more]``, or the same for each sample.

    Raises:
        ValueError: the tokens of the first one are no raster. Tokens of another that are none are no grid.
    """
    ids = (ids if ids.ndim == 2 else ids[0]).cpu()
    numbers, counts = torch.unique_consecutive(ids[:, 0], return_counts=True)
    generated: LatentGrid | None = None
    others: list[LatentGrid] = []
    start = 0
    for number, tokens in zip(numbers.tolist(), counts.tolist(), strict=True):
        row, column = ids[start : start + tokens, 1:3].unbind(1)
        width = int((row == row[0]).long().cumprod(0).sum())
        grid = LatentGrid((1, tokens // width, width), start)
        is_grid = tokens % width == 0 and all(
            _is_along(places.view(grid.grid), axis) for axis, places in ((1, row), (2, column))
        )
        if number != float(numbers.min()):
            others += [grid] * is_grid
        elif is_grid and generated is None:
            generated = grid
        else:
            raise ValueError(f"{tokens} image tokens are no raster of rows of {width}.")
        start += tokens
    assert generated is not None
    return [generated, *others]


def clips(coordinates: torch.Tensor) -> list[LatentGrid]:
    """The clips of a stream, from (frame, row, column) of each token ``[3, N]``, in any unit: what is generated, which
    ends the stream, then those before it.

    A clip ends where frames, rows or columns do not go on as they began. Conditions of fewer than
    :data:`LEAST_REFERENCE` tokens are not worth blocks of their own, and are no grids.

    Raises:
        ValueError: the stream does not end in a raster.
    """
    frame, row, column = coordinates.double().cpu()
    found: list[LatentGrid] = []
    start = 0
    while start < frame.numel():
        grid = _leading_raster(frame[start:], row[start:], column[start:])
        found.append(LatentGrid(grid, start))
        start = found[-1].stop
    *before, generated = found
    if generated.tokens == 1 < len(frame):
        raise ValueError("The coordinates of the last tokens are no raster.")
    return [generated, *(part for part in before if part.tokens >= LEAST_REFERENCE)]


def _leading_raster(frame: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> Grid:
    """The largest raster that a stream begins with."""

    def run(goes_on: torch.Tensor) -> int:
        return 1 + int(goes_on.long().cumprod(0).sum())

    width = run((frame[1:] == frame[0]) & (row[1:] == row[0]) & (column[1:] > column[:-1]))
    f, r, c = (x[: len(x) // width * width].unflatten(0, (-1, width)) for x in (frame, row, column))
    same = (f == frame[0]).all(1) & (r == r[:, :1]).all(1) & (c == c[0]).all(1)
    height = run(same[1:] & (r[1:, 0] > r[:-1, 0]))
    f, r, c = (x[: len(x) // height * height].unflatten(0, (-1, height)) for x in (f, r, c))
    same = (f == f[:, :1, :1]).flatten(1).all(1) & ((r == r[0]) & (c == c[0])).flatten(1).all(1)
    return run(same[1:] & (f[1:, 0, 0] > f[:-1, 0, 0])), height, width


def _is_along(values: torch.Tensor, axis: int) -> bool:
    """Whether values ``[F, H, W]`` grow along one axis and are equal along the others."""
    along = values.movedim(axis, 0)
    return bool((along == along[:, :1, :1]).all() and (along[1:, 0, 0] > along[:-1, 0, 0]).all())


def ends_of(indices: torch.Tensor, shapes: Sequence[Sequence[int]]) -> torch.Tensor:
    """Where items of a packed sequence lie, as a tensor, without waiting for the device.

    Args:
        indices: place in the sequence of each token ``[N]``, item after item.
        shapes: frames, rows and columns of each item in tokens.

    Returns:
        ``[items, 5]``: first place, last place, frames, rows, columns.
    """
    stops = list(accumulate(prod(shape) for shape in shapes))
    tokens = [prod(shape) for shape in shapes]
    first = indices[[stop - number for stop, number in zip(stops, tokens, strict=True)]]
    last = indices[[stop - 1 for stop in stops]]
    return torch.cat([torch.stack([first, last], 1), first.new_tensor([list(shape) for shape in shapes])], 1)


def items(ends: torch.Tensor) -> list[LatentGrid]:
    """The grids that :func:`ends_of` describes: the last item, which is what is generated, then those before it.

    Raises:
        ValueError: the tokens of the last item do not follow each other. An item before it of which that is so, or of
            fewer than :data:`LEAST_REFERENCE` tokens, is no grid.
    """
    *before, generated = ends.tolist()
    found: list[LatentGrid] = []
    for first, last, frames, height, width in (generated, *before):
        grid = LatentGrid((frames, height, width), first)
        if last == grid.stop - 1 and (not found or grid.tokens >= LEAST_REFERENCE):
            found.append(grid)
        elif not found:
            raise ValueError(f"{grid.tokens} latents of {grid.grid} lie from token {first} to token {last}.")
    return found
