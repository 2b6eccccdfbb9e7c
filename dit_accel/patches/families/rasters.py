"""Latent grids read off the positions of tokens."""

from __future__ import annotations

from itertools import pairwise

import torch

from ...layout import LatentGrid


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

    All have frames of one size. A clip before the last is told from the next by its frames, which begin at or after
    the next one's first.

    Raises:
        ValueError: the stream does not end in a raster.
    """
    frame, row, column = coordinates.double().cpu()
    same_frame = (frame == frame[-1]).flip(0).long().cumprod(0)
    per_frame = int(same_frame.sum())
    width = int((same_frame * (row == row[-1]).flip(0).long().cumprod(0)).sum())
    height = per_frame // width
    tokens = frame.numel()
    if per_frame == 1 or height * width != per_frame or tokens % per_frame:
        raise ValueError(f"{per_frame} tokens of a frame are no grid of rows of {width}.")
    firsts = frame[::per_frame]
    cuts = [0, *(((firsts[1:] <= firsts[:-1]).nonzero()[:, 0] + 1).tolist()), len(firsts)]
    found = []
    for begin, end in pairwise(cuts):
        part = slice(begin * per_frame, end * per_frame)
        raster = [axis[part].unflatten(0, (end - begin, height, width)) for axis in (frame, row, column)]
        if all(_is_along(values, axis) for axis, values in enumerate(raster)):
            found.append(LatentGrid((end - begin, height, width), part.start))
        elif end == len(firsts):
            raise ValueError("The coordinates of the last tokens are no raster.")
    return [found[-1], *found[:-1]]


def _is_along(values: torch.Tensor, axis: int) -> bool:
    """Whether values ``[F, H, W]`` grow along one axis and are equal along the others."""
    along = values.movedim(axis, 0)
    return bool((along == along[:, :1, :1]).all() and (along[1:, 0, 0] > along[:-1, 0, 0]).all())
