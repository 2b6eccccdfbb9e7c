"""An order: rows of the latent grid are read to and fro."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import dit_accel
from dit_accel.layout import TokenLayout
from dit_accel.stages.order.protocol import Order
from dit_accel.stages.order.simple import whole_sequence


@dit_accel.register("serpentine")
@dataclass(frozen=True)
class Serpentine(Order):
    """Every second row backwards, so that tokens that follow each other are neighbours on the grid.

    Attributes:
        rows_at_once: rows of one direction.
    """

    rows_at_once: int = 1

    def __post_init__(self) -> None:
        if self.rows_at_once < 1:
            raise ValueError(f"order.rows_at_once must be at least 1, got {self.rows_at_once}.")

    def rows(self, layout: TokenLayout, device: torch.device, layer: int = 0) -> torch.Tensor:
        def order_of(grid: tuple[int, int, int]) -> torch.Tensor:
            places = torch.arange(grid[0] * grid[1] * grid[2], device=device).view(grid).clone()
            backwards = torch.arange(grid[1], device=device) // self.rows_at_once % 2 == 1
            places[:, backwards] = places[:, backwards].flip(-1)
            return places.flatten()

        # Each grid by itself; tokens on no grid follow, as they come.
        return whole_sequence(layout, order_of)
