"""Run a few prompts densely, and keep what a recipe would choose: axis orders, masks per noise level."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import presets
from ..files import refuse_unwritable
from ..patches.artifact import CalibrationArtifact
from ..patches.learned import head_shape
from ..patches.targets import self_attentions, transformers_of
from ..recipe import Recipe
from ..stages.select.protocol import density_of_layer, shares_per_head
from .identity import describe, describe_pipeline
from .observations import Observations
from .progress import Clock, Progress
from .runs import begin, run_arguments


def calibrate(
    pipe: Any,
    prompts: Sequence[str | Mapping[str, Any]],
    recipe: Recipe | str,
    *,
    out: str | Path | None = None,
    buckets: int = 4,
    seeds: Sequence[int] | None = None,
    axis_prompts: int = 1,
    generate_kwargs: Mapping[str, Any] | None = None,
    resume: bool = True,
    progress: Callable[[Progress], None] = lambda _state: None,
    **options: Any,
) -> CalibrationArtifact:
    """Make a recipe's plans offline, from dense runs of a few prompts.

    A mean is taken over prompts, guidance branches and the steps of a noise level: of the exact block mass
    (selections by mass), of the pooled softmax (pooled selections), or of the masks themselves, of which blocks
    are then kept that at least half the calls chose (CalibAtt, arXiv 2603.05503). Recipes with ``ChosenAxes``
    first get an axis order per head (PAROAttention, arXiv 2506.16054).

    Args:
        pipe: a diffusers pipeline, not patched.
        prompts: texts, or arguments of the pipeline's call in place of one.
        recipe: a :class:`~dit_accel.Recipe` or a preset's name.
        out: file to write. What is done so far is kept beside it after every run, and a calibration that was
            interrupted goes on from there: the very same, of the same weights, prompts and arguments.
        buckets: noise levels with masks of their own; see :func:`~dit_accel.stages.select.frozen.bucket_edges`.
        seeds: of the runs, one per prompt; 0, 1, 2... if None.
        axis_prompts: how many of the prompts the axis orders are measured on.
        generate_kwargs: further arguments of the pipeline's call, such as size and steps: plans hold for one size,
            and for any number of steps.
        resume: False begins anew.
        progress: told after every denoising step.
        options: of the named preset.

    Raises:
        ValueError: a recipe with nothing to calibrate or that does not fit the model, what
            :func:`~dit_accel.calibration.runs.run_arguments` refuses, weights that cannot be read, a file that cannot
            be written, or what is beside ``out`` belongs to another calibration: all before the first run. A
            scheduler without sigmas, or a transformer that is never sparse: in or after the first.
    """
    chosen = presets.resolve(recipe, **options)
    arguments = run_arguments(pipe, prompts, generate_kwargs, seeds)
    for name, value in (("buckets", buckets), ("axis_prompts", axis_prompts)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    refuse_calibration(chosen, None if out is None else Path(out))
    _refuse_shares(chosen, pipe)
    draft = None if out is None else _beginning(Path(out))
    seeds = tuple(range(len(prompts)) if seeds is None else seeds)
    from .. import __version__

    asked = {
        "dit_accel": __version__,
        "recipe": chosen.to_dict(),
        "prompts": describe(prompts),
        "seeds": list(seeds),
        "buckets": buckets,
        "axis_prompts": axis_prompts,
        "arguments": describe(generate_kwargs or {}),
        "pipeline": describe_pipeline(pipe),
    }
    observed = Observations(pipe, chosen, buckets, asked)
    if draft is not None and resume and draft.exists():
        observed.restore(draft)
    runs = [("axis orders", n) for n in range(min(axis_prompts, len(prompts)))] if observed.axes is not None else []
    runs += [("masks", n) for n in range(len(prompts))]
    clock = Clock(len(runs), observed.finished, progress)
    for number, (stage, n) in enumerate(runs):
        if number < observed.finished:
            continue
        if stage == "masks":
            observed.choose_axes()
        observed.observe(stage, begin(arguments[n], seeds[n]), clock)
        observed.finished = number + 1
        if draft is not None:
            observed.save(draft)
    artifact = observed.artifact()
    if out is not None:
        artifact.save(out)
        assert draft is not None
        draft.unlink(missing_ok=True)
    return artifact


def refuse_calibration(recipe: Recipe, out: Path | None) -> None:
    """Check what can be known before the model is loaded.

    Raises:
        ValueError: a recipe with nothing to calibrate, or a file that cannot be written.
    """
    if recipe.select.is_static:
        raise ValueError(
            f"{type(recipe.select).__name__} chooses nothing from queries and keys: there is nothing to calibrate."
        )
    if recipe.order.follows_call:
        name = type(recipe.order).__name__
        raise ValueError(f"{name} orders each call anew: masks made for one call mean nothing in another.")
    if recipe.select.is_learned:
        name = type(recipe.select).__name__
        raise ValueError(f"{name} chooses by a gate of each layer, which a calibration does not know.")
    if recipe.compensate.watches_dense:
        name = type(recipe.compensate).__name__
        raise ValueError(
            f"{name} keeps something of dense steps that make plans, and a calibration makes them before: calibrate "
            "with another compensation."
        )
    if recipe.order.pads:
        name = type(recipe.order).__name__
        raise ValueError(f"{name} fills blocks with padding, which a calibration does not know.")
    for path in () if out is None else (out, _beginning(out)):
        refuse_unwritable(path)


def _beginning(out: Path) -> Path:
    """Where the beginning of a calibration is kept until the file is whole."""
    return out.with_name(out.name + ".partial")


def _refuse_shares(recipe: Recipe, pipe: Any) -> None:
    """Refuse densities per head that do not fit the model."""
    shares = recipe.select.head_densities
    for _, model, family in transformers_of(pipe):
        for layer, (_, module) in enumerate(self_attentions(model, family)):
            shares_per_head(density_of_layer(shares, layer), None, head_shape(module)[0], torch.device("cpu"))
