"""Positions on a device are read once for all forwards that are given the same ones, and never stale."""

from __future__ import annotations

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import dit_accel
from dit_accel.patches import placement
from dit_accel.patches.ambient import LatentTokens
from dit_accel.patches.families import FAMILIES
from dit_accel.patches.placement import ReadPlaces
from dit_accel.run import Run
from tests.tiny import TINY

FLUX = next(family for family in FAMILIES if family.name == "FLUX.1")


def positions(height: int, width: int) -> torch.Tensor:
    """(image, row, column) of each token, float32 ``[height * width, 3]``."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()


def write_uncounted(ids: torch.Tensor, others: torch.Tensor) -> None:
    """What a replayed CUDA graph does: other values at the same address, and no version that tells."""
    version = ids._version
    ids.numpy()[...] = others.numpy()
    assert ids._version == version


class Counted:
    """FLUX, whose readings are counted, and what keeps them."""

    def __init__(self) -> None:
        self.readings = 0
        self.places = ReadPlaces()
        self.family = replace(FLUX, read_ids=self._read)

    def _read(self, ids: torch.Tensor):
        self.readings += 1
        return FLUX.read_ids(ids)

    def grid(self, ids: torch.Tensor, run: Run | None = None) -> tuple[int, ...]:
        return self.places.place(self.family, LatentTokens((), len(ids), ids), run).grid


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


def test_a_run_reads_once_what_every_step_is_given() -> None:
    counted, ids, run = Counted(), positions(4, 6), Run()
    assert [counted.grid(ids, run) for _ in range(3)] == [(1, 4, 6)] * 3
    assert counted.readings == 1


def test_another_run_reads_anew_what_a_graph_has_written_to_the_same_address() -> None:
    counted, ids = Counted(), positions(4, 6)
    for height, width in ((4, 6), (6, 4), (3, 8)):
        write_uncounted(ids, positions(height, width))
        run = Run()
        assert [counted.grid(ids, run) for _ in range(3)] == [(1, height, width)] * 3
    assert counted.readings == 3
    write_uncounted(ids, positions(8, 3))
    assert counted.grid(ids) == (1, 8, 3)  # a bare forward behind a run
    write_uncounted(ids, positions(2, 12))
    assert counted.grid(ids, Run()) == (1, 2, 12)


def test_what_was_read_keeps_no_run_alive() -> None:
    counted, ids, run = Counted(), positions(4, 6), Run()
    counted.grid(ids, run)
    alive = weakref.ref(run)
    del run
    assert alive() is None
    assert counted.grid(ids, Run()) == (1, 4, 6)
    assert counted.readings == 2


@pytest.mark.parametrize("owned", [True, False])
def test_outside_a_run_what_a_graph_owns_is_read_each_time(owned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Tensor] = []
    monkeypatch.setattr(placement, "is_of_graph", lambda ids: asked.append(ids) or owned)
    counted, ids = Counted(), positions(4, 6)
    assert counted.grid(ids) == (1, 4, 6)
    assert not asked  # positions made anew for each forward are not asked about
    for height, width in ((4, 6), (4, 6)) if not owned else ((4, 6), (6, 4), (6, 4)):
        write_uncounted(ids, positions(height, width))
        assert counted.grid(ids) == (1, height, width)
    assert counted.readings == (4 if owned else 1)
    assert len(asked) == (3 if owned else 1)


@pytest.mark.parametrize(
    ("backend", "address", "found"),
    [("native", 150, False), ("native", 250, True), ("native", 50, True), ("cudaMallocAsync", 150, True)],
    ids=["common pool", "a graph's pool", "memory of others", "an allocator without an account"],
)
def test_whose_memory_it_is(backend: str, address: int, found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The segments of two GPUs lie at the same addresses."""
    segments = [
        {"device": 0, "address": 100, "total_size": 100, "segment_pool_id": (0, 1)},
        {"device": 1, "address": 100, "total_size": 100, "segment_pool_id": (0, 0)},
        {"device": 1, "address": 200, "total_size": 100, "segment_pool_id": (0, 1)},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda.memory, "get_allocator_backend", lambda: backend)
    ids = SimpleNamespace(device=torch.device("cuda", 1), data_ptr=lambda: address)
    assert placement.is_of_graph(ids) == found


def test_pipelines_whose_positions_lie_in_static_memory() -> None:
    """Two runs of another aspect ratio and as many tokens give what pipelines of their own give."""
    tiny = TINY["flux"]
    sizes = ((32, 48), (48, 32), (24, 64))
    fresh = []
    for height, width in sizes:
        pipe = tiny.build()
        with dit_accel.patch(pipe, "window"):
            fresh.append(tiny.run(pipe, height=height, width=width))
    pipe, static = tiny.build(), []
    make = pipe._prepare_latent_image_ids

    def in_static_memory(*args, **options):
        made = make(*args, **options)
        static or static.append(made.clone())
        write_uncounted(static[0], made)
        return static[0]

    pipe._prepare_latent_image_ids = in_static_memory
    with dit_accel.patch(pipe, "window") as handle:
        for (height, width), expected in zip(sizes, fresh, strict=True):
            assert torch.equal(tiny.run(pipe, height=height, width=width), expected)
        assert handle.summary().sparse_calls
    assert len(static) == 1


def test_a_run_in_inference_mode_reads_once() -> None:
    counted = Counted()
    with torch.inference_mode():
        ids, run = positions(4, 6), Run()
        assert [counted.grid(ids, run) for _ in range(3)] == [(1, 4, 6)] * 3
        assert counted.readings == 1
        ids.copy_(positions(6, 4))
        assert counted.grid(ids, Run()) == (1, 6, 4)


def test_what_is_no_raster_stays_without_a_grid() -> None:
    counted, ids = Counted(), positions(4, 6)[torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    assert counted.grid(ids) == counted.grid(ids) == ()
    assert counted.readings == 1
