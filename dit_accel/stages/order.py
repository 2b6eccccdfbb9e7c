"""In which order tokens form blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ..layout import TokenLayout


class Order(Protocol):
    """An order of the sequence. Latent tokens are permuted; all others follow them in their own order."""

    def rows(self, layout: TokenLayout, device: torch.device) -> torch.Tensor | None:
        """int32 ``[S]``: the token at each slot, or None for the order of the model."""
        ...


@dataclass(frozen=True)
class Raster:
    """The order of the model: frame by frame, row by row."""

    def rows(self, layout: TokenLayout, device: torch.device) -> torch.Tensor | None:
        return None


@dataclass(frozen=True)
class Tiles:
    """3-D tiles of the latent grid, each contiguous, so that a block is a compact volume.

    Tiles at the far borders of a grid that the tile shape does not divide are smaller; the tokens stay packed
    without padding. Tile orders are used by STA (arXiv 2502.04507) and VSA (arXiv 2505.13389).

    Attributes:
        shape: tile size in latent tokens (frames, height, width). An image, one frame deep, folds the frame
            share of the tile into height and width, so that a block stays full.
    """

    shape: tuple[int, int, int] = (4, 4, 4)

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"order.shape must be three tile sizes of at least 1, got {self.shape}.")

    def rows(self, layout: TokenLayout, device: torch.device) -> torch.Tensor | None:
        frames, height, width = layout.grid
        tile_f, tile_h, tile_w = self._shape_for(layout)
        f = torch.arange(frames, device=device)[:, None, None]
        h = torch.arange(height, device=device)[None, :, None]
        w = torch.arange(width, device=device)[None, None, :]
        tiles_h, tiles_w = -(-height // tile_h), -(-width // tile_w)
        tile = (f // tile_f * tiles_h + h // tile_h) * tiles_w + w // tile_w
        inside = (f % tile_f * tile_h + h % tile_h) * tile_w + w % tile_w
        key = tile * (tile_f * tile_h * tile_w) + inside
        latent = key.flatten().argsort() + layout.latent_start
        before = torch.arange(layout.latent_start, device=device)
        after = torch.arange(layout.latent_start + layout.num_latent, layout.seq_len, device=device)
        return torch.cat([latent, before, after]).to(torch.int32)

    def _shape_for(self, layout: TokenLayout) -> tuple[int, int, int]:
        tile_f, tile_h, tile_w = self.shape
        while layout.grid[0] < tile_f and tile_f % 2 == 0:
            tile_f //= 2
            tile_h, tile_w = (tile_h * 2, tile_w) if tile_h <= tile_w else (tile_h, tile_w * 2)
        return tile_f, tile_h, tile_w


ORDERS: dict[str, type[Raster] | type[Tiles]] = {"raster": Raster, "tiles": Tiles}
