"""What each of two processes of the tests of shared decisions runs: a tiny Wan on gloo, on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

import dit_accel
from dit_accel import Recipe, presets
from dit_accel.patches.reuse.together import Together
from dit_accel.stages.reuse.energy import Energy
from dit_accel.stages.reuse.first_block import FirstBlock
from dit_accel.stages.schedule import Schedule
from dit_accel.stages.select.mass import Mass
from tests.patches.ulysses_ranks import SPARSE, begin, end, flux, flux_given, patched, wan_pipeline
from tests.peaked import BLOCK, RECIPES
from tests.recipes import SMALL_TILES
from tests.tiny import TINY

STEPS = 8
KINDS: dict[str, dict[str, int]] = {"ring": {"ring_degree": 2}, "ulysses": {"ulysses_degree": 2}}


def recipe_with(threshold: float) -> Recipe:
    return replace(RECIPES["pooled"], schedule=Schedule(), reuse=FirstBlock(threshold))


def others() -> dict[str, Recipe]:
    """What decides otherwise than by the first block, and a profile of a whole run."""
    return {
        "energy": replace(RECIPES["pooled"], reuse=Energy(0.5)),
        "drift": replace(RECIPES["drift"], schedule=Schedule(drift_bound=0.3)),
        # Of blocks of which a tiny sequence has enough.
        "profile": replace(presets.fast(threshold=0.3), order=SMALL_TILES, select=Mass(density=0.3, block=BLOCK)),
    }


def ran(pipe: Any, recipe: Recipe, seed: int = 0) -> tuple[torch.Tensor, int, int, int]:
    """Output, forwards computed and skipped, and plans made."""
    with dit_accel.patch(pipe, recipe) as handle:
        out = TINY["wan"].run(pipe, steps=STEPS, generator=torch.Generator().manual_seed(seed))
        summary = handle.summary()
    plans = sum(layer.plans_made for layer in summary.layers)
    return out, summary.computed_forwards, summary.skipped_forwards, plans


def tensor_parallel(rank: int, world: int, path: Path) -> None:
    """A tiny FLUX whose weights two processes share, by heads."""
    begin(rank, world, path)
    from diffusers import TensorParallelConfig
    from diffusers.hooks import tensor_parallel as hooks

    hooks._SUPPORTED_TP_DEVICES = ("cpu", *hooks._SUPPORTED_TP_DEVICES)
    model = flux()
    model.enable_parallelism(config=TensorParallelConfig(tp_degree=world))
    found: dict[str, Any] = {}
    for name in TENSOR_PARALLEL:
        out, summary = patched(model, flux_given(), SPARSE[name])
        found[name] = out, summary
    end(rank, path, found)


# With a density of its own for each head, and a budget that heads share.
TENSOR_PARALLEL = ("pooled", "mass", "densities per head")


def sharded_weights(rank: int, world: int, path: Path) -> None:
    """A tiny Wan whose weights two processes share, each with a clip of its own."""
    begin(rank, world, path)
    from torch.distributed.fsdp import fully_shard

    pipe = wan_pipeline()
    for block in pipe.transformer.blocks:
        fully_shard(block)
    fully_shard(pipe.transformer)
    found = {}
    for name, recipe in (("sparse", RECIPES["mass"]), ("cached", recipe_with(0.1))):
        found[name] = ran(pipe, recipe, seed=rank)
    end(rank, path, found)


def work(rank: int, world: int, path: Path, kind: str) -> None:
    """All that one process finds, in a file."""
    begin(rank, world, path)
    pipe = wan_pipeline()
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(**KINDS[kind]))
    own: list[torch.Tensor] = []
    total = Together.total

    def seen(self: Together, sums: torch.Tensor) -> torch.Tensor:
        if sums.numel() == 2:
            own.append(sums.clone())
        return total(self, sums)

    Together.total = seen  # type: ignore[method-assign]
    ran(pipe, recipe_with(0.0))
    Together.total = total  # type: ignore[method-assign]
    ratios = torch.stack([change / size for change, size in own])
    both = [torch.empty_like(ratios) for _ in range(world)]
    dist.all_gather(both, ratios)
    apart = (both[0] - both[1]).abs()
    at = int(apart.argmax())
    found: dict[str, Any] = {"ratios": both, "at": at}
    found["threshold"] = threshold = float(both[0][at] + both[1][at]) / 2
    found["first block"] = ran(pipe, recipe_with(threshold))
    for name, recipe in others().items():
        found[name] = ran(pipe, recipe)
    end(rank, path, found)
