"""Orders that run through the grid's axes in another sequence than the model does."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from ...layout import Grid, TokenLayout
from .protocol import Order
from .simple import fold_tile, tile_order, whole_sequence

AXIS_ORDERS = ("fhw", "fwh", "hfw", "hwf", "wfh", "whf")
"""The six orders of frames, height and width, slowest axis first; "fhw" is the model's own."""

HEAD_ORDERS = (*AXIS_ORDERS, "tiles")
"""What a head may have for an order of its own: an axis order, or 3-D tiles of 4 x 4 x 4 tokens."""

MISSING = (
    "This recipe's axis orders are chosen by a calibration: run dit_accel.calibrate(pipe, prompts, recipe, "
    "out=file) or `dit-accel calibrate`, and pass calibration=file to patch."
)


@dataclass(frozen=True)
class AxisOrder(Order):
    """One of the six axis orders, or tiles, per layer and head: PAROAttention (arXiv 2506.16054).

    Heads that attend along one axis get dense blocks when that axis runs fastest; a head that looks around itself
    gets them from tiles, which the paper does not have.

    Attributes:
        axes: per layer, and in it per head, one of :data:`HEAD_ORDERS`. A single layer's entry serves all
            layers, and a single head's entry all heads.
    """

    axes: tuple[tuple[str, ...], ...] = (("fhw",),)

    def __post_init__(self) -> None:
        if not self.axes or not all(self.axes):
            raise ValueError(f"order.axes needs at least one layer with one head, got {self.axes}.")
        for name in (name for layer in self.axes for name in layer):
            if name not in HEAD_ORDERS:
                raise ValueError(f"order.axes must hold {', '.join(HEAD_ORDERS)}, got {name!r}.")

    @property
    def is_of_one_model(self) -> bool:
        return len(self.axes) > 1 or len(self.axes[0]) > 1

    def variant(self, layer: int) -> Hashable:
        return self._heads(layer)

    def rows(self, layout: TokenLayout, device: torch.device, layer: int = 0) -> torch.Tensor | None:
        heads = self._heads(layer)
        if set(heads) == {"fhw"}:
            return None
        orders = {name: whole_sequence(layout, partial(_head_order, name=name, device=device)) for name in set(heads)}
        return orders[heads[0]] if len(heads) == 1 else torch.stack([orders[name] for name in heads])

    def _heads(self, layer: int) -> tuple[str, ...]:
        if len(self.axes) == 1:
            return self.axes[0]
        if layer >= len(self.axes):
            raise ValueError(f"order.axes names {len(self.axes)} layers, the model has a layer {layer}.")
        return self.axes[layer]


@dataclass(frozen=True)
class ChosenAxes(Order):
    """The axis order that suits each head, chosen by a calibration (PAROAttention, arXiv 2506.16054).

    A calibration measures the six orders on a few prompts and puts an :class:`AxisOrder` in its place.

    Attributes:
        sparse_weight: weight of skippable tiles against tiles that quantise well, see
            :meth:`~dit_accel.stages.order.axis_choice.AxisScores.combined`.
        tile: tokens of the square tiles that are judged.
    """

    sparse_weight: float = 0.5
    tile: int = 64
    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparse_weight <= 1.0:
            raise ValueError(f"order.sparse_weight must lie in [0, 1], got {self.sparse_weight}.")
        if self.tile < 1:
            raise ValueError(f"order.tile must be at least 1 token, got {self.tile}.")

    def variant(self, _layer: int) -> Hashable:
        raise ValueError(MISSING)

    def rows(self, _layout: TokenLayout, _device: torch.device, _layer: int = 0) -> torch.Tensor | None:
        raise ValueError(MISSING)


def axis_order(grid: tuple[int, int, int], axes: str, device: torch.device) -> torch.Tensor:
    """int64 ``[F * H * W]``: raster indices with the first letter of ``axes`` slowest, the last fastest."""
    number = torch.arange(grid[0] * grid[1] * grid[2], device=device).view(grid)
    return number.permute(*("fhw".index(axis) for axis in axes)).flatten()


def _head_order(grid: tuple[int, int, int], name: str, device: torch.device) -> torch.Tensor:
    if name == "tiles":
        return tile_order(grid, fold_tile((4, 4, 4), grid[0]), device)
    return axis_order(grid, name, device)


@dataclass(frozen=True)
class Chunks(Order):
    """Temporal, spatial and 3-D chunks in turn, layer by layer: VMoBA's cyclic partition (arXiv 2506.23858).

    Layer 0, 3, 6... cuts the clip in time, layer 1, 4... in height and width, layer 2, 5... in all three. The
    tokens of a chunk are contiguous; chunks at the far borders may be smaller.

    Attributes:
        temporal: frames of a temporal chunk.
        spatial: height and width of a spatial chunk, which reaches through all frames.
        volume: frames, height and width of a 3-D chunk.
    """

    temporal: int = 1
    spatial: tuple[int, int] = (4, 4)
    volume: tuple[int, int, int] = (4, 4, 4)

    def __post_init__(self) -> None:
        if min(self.temporal, *self.spatial, *self.volume) < 1:
            raise ValueError(
                f"order.temporal, order.spatial and order.volume must be at least 1 token per dimension, got "
                f"{self.temporal}, {self.spatial} and {self.volume}."
            )

    def variant(self, layer: int) -> Hashable:
        return layer % 3

    def rows(self, layout: TokenLayout, device: torch.device, layer: int = 0) -> torch.Tensor | None:
        def order(grid: Grid) -> torch.Tensor:
            frames, height, width = grid
            chunks = (self.temporal, height, width), (frames, *self.spatial), self.volume
            return tile_order(grid, chunks[layer % 3], device)

        return whole_sequence(layout, order)
