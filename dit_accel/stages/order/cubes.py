"""Each 3-D tile of the grid a block of its own, short ones filled up."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch

from ...layout import Grid, TokenLayout
from ...plan import tokens_on_grids
from ..select.protocol import Select
from .protocol import Order
from .simple import fold_tile


@dataclass(frozen=True)
class Cubes(Order):
    """3-D tiles of the latent grid, each exactly one block, as VSA has them (arXiv 2505.13389).

    Where the tile shape does not divide the grid, the tiles at its far borders have fewer tokens, and padding that
    nobody sees fills their blocks: queries, keys and values are then copied once a call. :class:`Tiles` packs the same
    tiles without padding, and its blocks straddle them. Other tokens follow in blocks of their own.

    Attributes:
        shape: tile size in latent tokens (frames, height, width), as many tokens as a block of the selection. An image
            folds it, see :class:`~dit_accel.stages.order.simple.Tiles`.
    """

    shape: tuple[int, int, int] = (4, 4, 4)

    spans_references: ClassVar[bool] = False
    pads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"order.shape must be three tile sizes of at least 1, got {self.shape}.")

    def conflicts_with(self, select: Select) -> str | None:
        volume = prod(self.shape)
        if not select.is_dense and select.block != (volume, volume):
            return f"Cubes of {self.shape} need blocks of {(volume, volume)} tokens, got select.block {select.block}."
        return super().conflicts_with(select)

    def padding(self, layout: TokenLayout) -> int:
        tile = fold_tile(self.shape, layout.grid[0])
        return prod(tile) * prod(_tiles(layout.grid, tile)) - layout.num_latent

    def rows(self, layout: TokenLayout, device: torch.device, _layer: int = 0) -> torch.Tensor | None:
        missing = self.padding(layout)
        if layout.padding != missing:
            raise ValueError(
                f"{layout} needs {missing} tokens of padding for cubes of {self.shape}, got {layout.padding}."
            )
        slots = cube_slots(layout.grid, fold_tile(self.shape, layout.grid[0]), device)
        latents = torch.empty(layout.num_latent + layout.padding, dtype=torch.int64, device=device)
        # Padding first: the latents then take their places.
        latents.fill_(-1)
        latents[slots] = layout.latent_start + torch.arange(layout.num_latent, device=device)
        first = layout.seq_len - layout.padding
        latents[latents < 0] = torch.arange(first, layout.seq_len, device=device)
        others = (~tokens_on_grids(layout, device)).nonzero()[:, 0]
        return torch.cat([latents, others]).to(torch.int32)


def cube_slots(grid: Grid, tile: Grid, device: torch.device) -> torch.Tensor:
    """int64 ``[F * H * W]``: the slot of each token of a raster, where every tile has as many slots as tokens fit in a
    whole one; a short tile's tokens take its first slots, in raster order."""
    _, tiles_h, tiles_w = _tiles(grid, tile)
    f, h, w = (torch.arange(size, device=device) for size in grid)
    # The last tile of a dimension is as deep as what is left there.
    _, high, wide = (
        (size - at // step * step).clamp(max=step) for size, step, at in zip(grid, tile, (f, h, w), strict=True)
    )
    f, h, w = f[:, None, None], h[None, :, None], w[None, None, :]
    number = (f // tile[0] * tiles_h + h // tile[1]) * tiles_w + w // tile[2]
    inside = (f % tile[0] * high[None, :, None] + h % tile[1]) * wide[None, None, :] + w % tile[2]
    return (number * prod(tile) + inside).flatten()


def _tiles(grid: Grid, tile: Grid) -> Grid:
    frames, height, width = (-(-size // step) for size, step in zip(grid, tile, strict=True))
    return frames, height, width
