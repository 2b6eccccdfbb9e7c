"""What each process of the tests of compensations around a ring runs: tiny models on gloo, on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from diffusers import ContextParallelConfig

from dit_accel import Recipe
from dit_accel.stages.compensate.linear import LinearBranch
from dit_accel.stages.select.pooled import Pooled
from tests.patches.trained_ranks import Found, train
from tests.patches.ulysses_ranks import begin, end, flux, flux_given, qwen, qwen_given, wan, wan_given
from tests.peaked import BLOCK
from tests.recipes import SMALL_TILES

POOLED = Pooled(density=0.4, block=BLOCK)
LEARNED = {
    "paper": Recipe(SMALL_TILES, POOLED, LinearBranch(negligible_share=0.3)),
    "not selected, hedgehog": Recipe(SMALL_TILES, POOLED, LinearBranch("non_critical", "hedgehog")),
    "all tokens": Recipe(SMALL_TILES, POOLED, LinearBranch("all_tokens")),
    "all tokens, elu": Recipe(SMALL_TILES, replace(POOLED, block=(64, 32)), LinearBranch("all_tokens", "elu")),
    "uneven blocks, relu": Recipe(SMALL_TILES, replace(POOLED, block=(64, 32)), LinearBranch("paper", "relu")),
}
# With text that comes interleaved, and with hidden keys.
MODELS = {"wan": (wan, wan_given), "flux": (flux, flux_given), "qwen-image": (qwen, qwen_given)}
RECIPES_OF = {"wan": tuple(LEARNED), "flux": ("paper", "all tokens"), "qwen-image": ("paper", "all tokens")}


def in_ring(model: Any, ring: int, ulysses: int = 1, **options: Any) -> Any:
    model.enable_parallelism(config=ContextParallelConfig(ring_degree=ring, ulysses_degree=ulysses, **options))
    return model


def summed(found: Found) -> Found:
    for grad in found[1].values():
        dist.all_reduce(grad)
    return found


def work(rank: int, world: int, path: Path) -> None:
    """All that one process finds, in a file."""
    begin(rank, world, path)
    found: dict[Any, Any] = {}
    for name, (build, inputs) in MODELS.items():
        for recipe in RECIPES_OF[name]:
            found[name, recipe] = summed(train(in_ring(build(), world), inputs(), LEARNED[recipe]))
    end(rank, path, found)
