"""In which order tokens form blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...layout import Grid, TokenLayout
from ...plan import tokens_on_grids
from .protocol import Order


def whole_sequence(layout: TokenLayout, order_of: Callable[[Grid], torch.Tensor]) -> torch.Tensor:
    """int32 ``[S]``: each grid in an order of its own, one after the other, then all other tokens as they come.

    Args:
        order_of: raster indices ``[F * H * W]`` of a grid in their new order.
    """
    latents = [order_of(part.grid) + part.start for part in layout.grids]
    device = latents[0].device
    others = (~tokens_on_grids(layout, device)).nonzero()[:, 0]
    padding = torch.arange(layout.seq_len - layout.padding, layout.seq_len, device=device)
    return torch.cat([*latents, others, padding]).to(torch.int32)


@dataclass(frozen=True)
class Raster(Order):
    """The order of the model: frame by frame, row by row."""

    permutes: ClassVar[bool] = False

    def rows(self, _layout: TokenLayout, _device: torch.device, _layer: int = 0) -> torch.Tensor | None:
        return None


@dataclass(frozen=True)
class Tiles(Order):
    """3-D tiles of the latent grid, each contiguous, so that a block is a compact volume.

    Tiles at the far borders of a grid that the tile shape does not divide are smaller; the tokens stay packed
    without padding. Tile orders are used by STA (arXiv 2502.04507) and VSA (arXiv 2505.13389).

    Attributes:
        shape: tile size in latent tokens (frames, height, width). An image, one frame deep, folds the frame
            share of the tile into height and width, so that a block stays full.
        dilation: tokens of a grid that lie so far apart (frames, height, width) form a group, and each group is tiled
            by itself: with the dilation of a window the groups that a query does not see are other blocks (DiNA).
    """

    shape: tuple[int, int, int] = (4, 4, 4)
    dilation: tuple[int, int, int] = (1, 1, 1)

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"order.shape must be three tile sizes of at least 1, got {self.shape}.")
        if len(self.dilation) != 3 or min(self.dilation) < 1:
            raise ValueError(f"order.dilation must be three distances of at least 1, got {self.dilation}.")

    def rows(self, layout: TokenLayout, device: torch.device, _layer: int = 0) -> torch.Tensor | None:
        return whole_sequence(layout, lambda grid: self._of_grid(grid, device))

    def _of_grid(self, grid: Grid, device: torch.device) -> torch.Tensor:
        deep = -(-grid[0] // self.dilation[0])
        return tile_order(grid, fold_tile(self.shape, deep), device, self.dilation)


def fold_tile(tile: tuple[int, int, int], frames: int) -> tuple[int, int, int]:
    """A tile for a grid of fewer frames than the tile has: halves of its depth go to height and width."""
    tile_f, tile_h, tile_w = tile
    while frames < tile_f and tile_f % 2 == 0:
        tile_f //= 2
        tile_h, tile_w = (tile_h * 2, tile_w) if tile_h <= tile_w else (tile_h, tile_w * 2)
    return tile_f, tile_h, tile_w


def tile_order(
    grid: tuple[int, int, int],
    tile: tuple[int, int, int],
    device: torch.device,
    dilation: tuple[int, int, int] = (1, 1, 1),
) -> torch.Tensor:
    """int64 ``[F * H * W]``: raster indices tile by tile, raster order among tiles and inside each; with a ``dilation``
    group by group, and the tiles are of a group's tokens."""
    (tile_f, tile_h, tile_w), (gap_f, gap_h, gap_w) = tile, dilation
    f = torch.arange(grid[0], device=device)[:, None, None]
    h = torch.arange(grid[1], device=device)[None, :, None]
    w = torch.arange(grid[2], device=device)[None, None, :]
    group = (f % gap_f * gap_h + h % gap_h) * gap_w + w % gap_w
    f, h, w = f // gap_f, h // gap_h, w // gap_w
    # Of the longest group in each dimension; others have fewer.
    tiles_f, tiles_h, tiles_w = (-(-size // (step * gap)) for size, step, gap in zip(grid, tile, dilation, strict=True))
    number = ((group * tiles_f + f // tile_f) * tiles_h + h // tile_h) * tiles_w + w // tile_w
    inside = (f % tile_f * tile_h + h % tile_h) * tile_w + w % tile_w
    return (number * (tile_f * tile_h * tile_w) + inside).flatten().argsort()
