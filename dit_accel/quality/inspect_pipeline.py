"""Watch a pipeline's attention while it generates, and picture where its mass lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..api import patch
from ..call import AttentionCall
from ..layout import TokenLayout
from ..parts import Parts
from ..patches.targets import transformers_of
from ..recipe import Recipe
from ..stages.order.simple import Raster, Tiles
from .inspection import Inspection, Observation, write_inspection
from .observation_files import SUFFIX, read_observations, write_observations
from .patterns import block_pattern

ORDERS: Mapping[str, Raster | Tiles] = {"raster": Raster(), "tiles": Tiles()}


def inspect_pipeline(
    pipe: Any,
    generate: Callable[[], Any],
    out: Path | str,
    *,
    recipe: Recipe | str = "pooled",
    steps: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    branch: str | None = None,
    target: float = 0.95,
    parts: Parts | None = None,
) -> Inspection:
    """Run ``generate()`` under a recipe and write maps and tables of the attention seen.

    The recipe's mask is judged on the very call it was used in; the model runs on under the recipe.

    Args:
        pipe: a diffusers pipeline, not patched.
        generate: runs the pipeline once.
        out: folder for PNGs and ``patterns.json``.
        recipe: whose masks to judge.
        steps, layers: which to look at; None for all. Each costs a quadratic pass, linear in memory.
        branch: guidance branch to look at; None for the first forward of each step.
        target: share of the mass whose density is reported.
        parts: where the patterns of each call are kept until all is written, in a folder that was claimed for these
            very settings: those that are there are not computed again. None keeps none.

    Raises:
        ValueError: nothing was observed at those steps and layers.
    """
    transformers = {name for name, _, _ in transformers_of(pipe)}  # control networks are not looked at
    seen: dict[str, list[Observation]] = {}

    def observer(transformer: str, call: AttentionCall) -> None:
        index = call.step.index or 0
        if (steps is not None and index not in steps) or (layers is not None and call.layer not in layers):
            return
        if branch is not None and call.step.branch != branch:
            return
        if not isinstance(call.layout, TokenLayout) or transformer not in transformers:
            return
        part = f"{transformer or 'transformer'}-{call.layer:03d}-{index:04d}"
        if part in seen:
            return
        kept = None if parts is None else read_observations(parts.path(part, SUFFIX))
        if kept is None:
            kept = _observations(call, index)
            if parts is not None:
                write_observations(kept, parts.path(part, SUFFIX))
        seen[part] = kept

    with patch(pipe, recipe) as handle, handle.observe(observer):
        generate()
    found = write_inspection(
        [observation for kept in seen.values() for observation in kept],
        Path(out),
        target=target,
        facts={"pipeline": type(pipe).__name__, "recipe": repr(handle.recipe)},
    )
    if parts is not None:
        parts.clear()
    return found


@torch.no_grad()
def _observations(call: AttentionCall, step: int) -> list[Observation]:
    """Of one call, under every order that is looked at."""
    assert isinstance(call.layout, TokenLayout)
    views: dict[str, dict[str, Any]] = {
        name: {"rows": order.rows(call.layout, call.q.device)} for name, order in ORDERS.items()
    }
    if call.plan is not None:
        views["recipe"] = {"rows": call.plan.rows, "mask": call.plan.mask}
    given: dict[str, Any] = {"key_mask": call.key_mask, "pairs": call.pairs, "scale": call.scale}
    keys = dict.fromkeys(views, call.k)
    if call.plan is not None:
        keys["recipe"] = call.with_keys(call.plan.keys).k
    return [
        Observation(call.layer, step, name, block_pattern(call.q, keys[name], **given, **view), call.step.sigma)
        for name, view in views.items()
    ]
