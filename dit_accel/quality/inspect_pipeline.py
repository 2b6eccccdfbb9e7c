"""Watch a pipeline's attention while it generates, and picture where its mass lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..api import patch
from ..call import AttentionCall
from ..layout import TokenLayout
from ..patches.targets import transformers_of
from ..recipe import Recipe
from ..stages.order.simple import Raster, Tiles
from .inspection import Inspection, Observation, write_inspection
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

    Raises:
        ValueError: nothing was observed at those steps and layers.
    """
    transformers = {name for name, _, _ in transformers_of(pipe)}  # control networks are not looked at
    seen: dict[tuple[str, int, int, str], Observation] = {}

    def observer(transformer: str, call: AttentionCall) -> None:
        index = call.step.index or 0
        if (steps is not None and index not in steps) or (layers is not None and call.layer not in layers):
            return
        if branch is not None and call.step.branch != branch:
            return
        if not isinstance(call.layout, TokenLayout) or transformer not in transformers:
            return
        views: dict[str, dict[str, Any]] = {
            name: {"rows": order.rows(call.layout, call.q.device)} for name, order in ORDERS.items()
        }
        if call.plan is not None:
            views["recipe"] = {"rows": call.plan.rows, "mask": call.plan.mask}
        for name, view in views.items():
            # Two transformers share a run: the second takes over at its own steps.
            key = (transformer, call.layer, index, name)
            if key not in seen:
                with torch.no_grad():
                    pattern = block_pattern(
                        call.q, call.k, key_mask=call.key_mask, pairs=call.pairs, scale=call.scale, **view
                    )
                seen[key] = Observation(call.layer, index, name, pattern, call.step.sigma)

    with patch(pipe, recipe) as handle, handle.observe(observer):
        generate()
    return write_inspection(
        list(seen.values()),
        Path(out),
        target=target,
        facts={"pipeline": type(pipe).__name__, "recipe": repr(handle.recipe)},
    )
