"""A latent grid from the positions of its tokens, for models that are given no size."""

from __future__ import annotations

import torch


def grid_of_ids(img_ids: torch.Tensor) -> tuple[tuple[int, int, int], int]:
    """From (image, row, column, ...) of each token, ``[tokens, 3 or more]`` or the same for each sample: the image with
    the smallest number, which is the one that is made."""
    ids = (img_ids if img_ids.ndim == 2 else img_ids[0]).cpu()
    places = (ids[:, 0] == ids[:, 0].min()).nonzero().flatten()
    start, tokens = int(places[0]), len(places)
    row, column = ids[places, 1:3].unbind(1)
    # in any unit: FLUX.3 counts in halves
    width = int((row == row[0]).long().cumprod(0).sum())
    if tokens % width or int(places[-1]) - start + 1 != tokens:
        raise ValueError(f"{tokens} image tokens are no grid of rows of {width}.")
    row, column = row.unflatten(0, (-1, width)), column.unflatten(0, (-1, width))
    if not bool((row == row[:, :1]).all() and (column == column[:1]).all()):
        raise ValueError(f"The places of {tokens} image tokens are no raster of rows of {width}.")
    return (1, len(row), width), start
