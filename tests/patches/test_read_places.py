"""Positions on a device are read once for all forwards that are given the same ones, and never stale."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dit_accel.patches.ambient import LatentTokens
from dit_accel.patches.families import FAMILIES
from dit_accel.patches.placement import ReadPlaces

FLUX = next(family for family in FAMILIES if family.name == "FLUX.1")


def positions(height: int, width: int) -> torch.Tensor:
    """(image, row, column) of each token, float32 ``[height * width, 3]``."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()


class Counted:
    """FLUX, whose readings are counted, and what keeps them."""

    def __init__(self) -> None:
        self.readings = 0
        self.places = ReadPlaces()
        self.family = replace(FLUX, read_ids=self._read)

    def _read(self, ids: torch.Tensor):
        self.readings += 1
        return FLUX.read_ids(ids)

    def grid(self, ids: torch.Tensor) -> tuple[int, ...]:
        return self.places.place(self.family, LatentTokens((), len(ids), ids)).grid


def test_the_same_positions_are_read_once() -> None:
    counted, ids = Counted(), positions(4, 6)
    assert [counted.grid(ids) for _ in range(3)] == [(1, 4, 6)] * 3
    assert counted.grid(ids.view(24, 3)) == (1, 4, 6)  # a view made anew each forward, as some families' is
    assert counted.readings == 1


def test_positions_changed_in_place_are_read_anew() -> None:
    counted, ids = Counted(), positions(4, 6)
    assert counted.grid(ids) == (1, 4, 6)
    ids.copy_(positions(6, 4))
    assert counted.grid(ids) == (1, 6, 4)
    ids.view(24, 3).copy_(positions(3, 8))
    assert counted.grid(ids) == (1, 3, 8)


def test_other_positions_are_read() -> None:
    counted = Counted()
    for height, width in ((4, 6), (6, 4), (4, 6), (2, 3)):
        assert counted.grid(positions(height, width)) == (1, height, width)
    assert counted.readings == 4


def test_a_part_of_the_same_memory_is_other_positions() -> None:
    counted, ids = Counted(), positions(4, 6)
    assert counted.grid(ids) == (1, 4, 6)
    assert counted.grid(ids[:12]) == (1, 2, 6)
    assert counted.grid(ids.view(4, 6, 3)[:, :3].transpose(0, 1).reshape(12, 3)[:, [0, 2, 1]]) == (1, 3, 4)


def test_nobody_else_gets_the_memory_of_what_was_read() -> None:
    counted, ids = Counted(), positions(4, 6)
    counted.grid(ids)
    read_at = ids.data_ptr()
    del ids
    others = [positions(6, 4) for _ in range(64)]
    assert read_at not in [other.data_ptr() for other in others]
    assert {counted.grid(other) for other in others} == {(1, 6, 4)}


@pytest.mark.parametrize("made_inside", [True, False])
def test_in_inference_mode_nothing_stale_is_served(made_inside: bool) -> None:
    counted = Counted()
    ids = positions(4, 6)
    with torch.inference_mode():
        ids = ids.clone() if made_inside else ids
        assert counted.grid(ids) == (1, 4, 6)
        if made_inside:  # in-place changes of such a tensor are not counted by anybody
            ids.copy_(positions(6, 4))
            assert counted.grid(ids) == (1, 6, 4)
    assert counted.grid(ids) == ((1, 6, 4) if made_inside else (1, 4, 6))


def test_what_is_no_raster_stays_without_a_grid() -> None:
    counted, ids = Counted(), positions(4, 6)[torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    assert counted.grid(ids) == counted.grid(ids) == ()
    assert counted.readings == 1
