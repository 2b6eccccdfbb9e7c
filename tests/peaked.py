"""Tiny models whose attention is peaked, so that another plan shows in the output, and recipes that keep state."""

from __future__ import annotations

from typing import Any

import torch

from dit_accel import Recipe
from dit_accel.patches.families import family_of
from dit_accel.stages.compensate.residual import PooledResidual
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
