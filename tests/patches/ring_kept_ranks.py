"""What each process of the tests of kept plans around a ring runs: pipelines side by side, on gloo, on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import dit_accel
from dit_accel.kernels import BlockMask
from dit_accel.stages.schedule import Schedule
from tests.patches.ring_ranks import in_ring
from tests.patches.ulysses_ranks import begin, end, wan_pipeline
from tests.recipes import POOLED
from tests.tiny import TINY

# Each plan serves two steps, in both guidance branches.
KEPT = replace(POOLED, schedule=Schedule(dense_fraction=0.0, refresh_every=2))
RUNS = {"first": {}, "wider": {"width": 64}, "again": {}}


def runs(pipes: list[Any]) -> dict[Any, tuple[torch.Tensor, int, int, int]]:
    """Of every run of two pipelines in turns the latents, sparse calls, plans made and cuts of masks."""
    found = {}
    with (
        mock.patch.object(BlockMask, "parts", autospec=True, side_effect=BlockMask.parts) as cuts,
        dit_accel.patch(pipes[0], KEPT) as first,
        dit_accel.patch(pipes[1], replace(KEPT, select=replace(POOLED.select, density=0.6))) as second,  # type: ignore[type-var]
    ):
        for name, changes in RUNS.items():
            for which, handle in enumerate((first, second)):
                before, cut_before = handle.summary(), cuts.call_count
                out = TINY["wan"].run(pipes[which], steps=4, **changes)
                after = handle.summary()
                plans = sum(layer.plans_made for layer in after.layers) - sum(x.plans_made for x in before.layers)
                calls = after.sparse_calls - before.sparse_calls
                found[name, which] = out, calls, plans, cuts.call_count - cut_before
    return found


def work(rank: int, world: int, path: Path) -> None:
    """All that one process finds, in a file."""
    begin(rank, world, path)
    pipes = [wan_pipeline(), wan_pipeline()]
    for pipe in pipes:
        in_ring(pipe.transformer, world)
    end(rank, path, runs(pipes))
