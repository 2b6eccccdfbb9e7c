"""Tiny models whose attention is peaked, so that another plan shows in the output, and recipes that keep state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dit_accel import Recipe
from dit_accel.patches.families import family_of
from dit_accel.stages.compensate.residual import PooledResidual
from dit_accel.stages.reuse.energy import Energy
from dit_accel.stages.reuse.first_block import FirstBlock
from dit_accel.stages.reuse.forecast import Forecast
from dit_accel.stages.reuse.listed import Listed
from dit_accel.stages.reuse.magnitude import Magnitude
from dit_accel.stages.reuse.none import NoReuse
from dit_accel.stages.reuse.protocol import Reuse
from dit_accel.stages.schedule import Schedule
from dit_accel.stages.select.mass import FrozenMass, Mass
from dit_accel.stages.select.pooled import Pooled
from dit_accel.stages.select.static import Window
from tests.recipes import SMALL_TILES

BLOCK = (32, 32)
_SEARCH = {"refresh_at": (0.2, 0.6), "dense_refresh": True, "refresh_every": 2}
RECIPES = {
    "mass": Recipe(
        SMALL_TILES,
        Mass(density=0.3, head_adaptive=False, block=BLOCK),
        schedule=Schedule(
            dense_fraction=0.3, refresh_at=(0.0,), dense_refresh=True, plan_in_dense_phase=True, refresh_every=4
        ),
    ),
    "pooled": Recipe(SMALL_TILES, Pooled(density=0.3, block=BLOCK), schedule=Schedule(refresh_every=3)),
    "adaspa": Recipe(select=Mass(density=0.3, block=BLOCK), schedule=Schedule(dense_fraction=0.2, **_SEARCH)),
    "drift": Recipe(SMALL_TILES, Pooled(density=0.3, block=BLOCK), schedule=Schedule(drift_bound=0.3)),
    "window": Recipe(SMALL_TILES, Window(window=(1.0, 0.5, 0.5), block=BLOCK), schedule=Schedule(dense_fraction=0.2)),
    "sparsed": Recipe(select=FrozenMass(density=0.3, block=BLOCK), schedule=Schedule(dense_fraction=0.2, **_SEARCH)),
    "residual": Recipe(
        SMALL_TILES, Pooled(density=0.3, block=BLOCK), PooledResidual(), schedule=Schedule(refresh_every=2)
    ),
}

# Rules that skip some steps of tiny models and compute others.
REUSES: dict[str, Reuse] = {
    "none": NoReuse(),
    "first_block": FirstBlock(0.05),
    "magnitude": Magnitude(0.05, 2, 0.0, (1.0, 1.03, 0.98, 1.01)),
    "forecast": Forecast(interval=2, warmup=1),
    "energy": Energy(0.5),
    "listed": Listed((0, 2, 3), 6, order=1),
}


def recipe_of(name: str) -> Recipe:
    """A recipe of :data:`RECIPES`, or one with a reuse of :data:`REUSES` behind a plus."""
    recipe, _, reuse = name.partition("+")
    return replace(RECIPES[recipe], reuse=REUSES[reuse or "none"])


def peaked(model: Any, by: float = 4.0) -> Any:
    """The model with larger queries in its self-attention, and its parameters frozen in evaluation mode."""
    family = family_of(model)
    assert family is not None
    with torch.no_grad():
        for path, module in model.named_modules():
            if family.has_self_attention(path):
                module.norm_q.weight.mul_(by)
    return model.eval()


def peaked_pipeline(pipe: Any, by: float = 4.0) -> Any:
    """The pipeline with all of its transformers peaked."""
    for name, model in pipe.components.items():
        if name.startswith("transformer") and model is not None:
            peaked(model, by)
    pipe.set_progress_bar_config(disable=True)
    return pipe
