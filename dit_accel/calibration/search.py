"""A density for each layer and head, and the order in which its tokens form blocks, found for a pipeline's model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .. import presets
from ..parts import Parts
from ..patches.said_once import said_once
from ..patches.targets import transformers_of
from ..recipe import Recipe
from .allocation import allocate, check_target
from .head_errors import (
    DENSITIES,
    PROBE,
    HeadErrors,
    at_density,
    check_reachable,
    check_select,
    in_orders,
    least_kept,
    measure_heads,
)
from .progress import Progress
from .recording import first_forwards, first_input, record_inputs
from .runs import asked_of, begin, run_arguments


def with_densities(recipe: Recipe, head_densities: tuple[tuple[float, ...], ...]) -> Recipe:
    """The recipe with a density per head, and their mean in its density."""
    shares = [share for layer in head_densities for share in layer]
    mean = round(sum(shares) / len(shares), 6)
    return recipe.with_fields({"select.density": mean, "select.head_densities": head_densities})


def with_orders(recipe: Recipe, orders: tuple[tuple[str, ...], ...]) -> Recipe:
    """The recipe with an order per layer and head, some of :data:`~dit_accel.stages.order.axes.HEAD_ORDERS`."""
    return recipe.with_fields({"order": "axes", "order.axes": orders})


@dataclass(frozen=True, eq=False)
class Found:
    """What :func:`search` found.

    Attributes:
        recipe: with a density, and where orders were given an order, per layer and head.
        errors: what was measured; further targets need only :func:`~dit_accel.calibration.allocation.allocate`.
        density: mean share of the blocks that it keeps.
        predicted_error: relative error of the velocity, if errors of heads are independent.
        predicted_uniform: the same with one density for all heads, that of ``density``, in the first order.
    """

    recipe: Recipe
    errors: HeadErrors
    density: float
    predicted_error: float
    predicted_uniform: float


@said_once()
def search(
    pipe: Any,
    prompts: Sequence[Any],
    recipe: Recipe | str,
    *,
    mean_density: float | None = None,
    max_error: float | None = None,
    orders: Sequence[str] = (),
    samples: int = 3,
    densities: Sequence[float] = DENSITIES,
    seed: int = 0,
    generate_kwargs: Mapping[str, Any] | None = None,
    parts: Parts | None = None,
    progress: Callable[[Progress], None] = lambda _state: None,
) -> Found:
    """Find a density, and an order if there is a choice, for every head of a pipeline's transformer.

    Dense runs of the prompts give the forwards that heads are measured on, see
    :func:`~dit_accel.calibration.head_errors.measure_heads`; their number is that of heads times prompts times
    ``samples``. Every transformer forward of a sampled step counts as one: a pipeline that runs its guidance branches
    one by one is measured on the first.

    Args:
        pipe: a diffusers pipeline with one transformer, not patched.
        prompts: texts, or arguments of the pipeline's call in place of one.
        recipe: a :class:`~dit_accel.Recipe` or a preset's name, whose selection takes a density per head.
        mean_density, max_error: the target, see :func:`~dit_accel.calibration.allocation.allocate`.
        orders: that heads may choose from, see :func:`~dit_accel.calibration.head_errors.measure_heads`; none keeps the
            recipe's order.
        samples: denoising steps measured, spread over those after the recipe's dense phase.
        densities: see :func:`~dit_accel.calibration.head_errors.measure_heads`.
        seed: of the first prompt's run; each further one adds 1.
        generate_kwargs: further arguments of the pipeline's call, such as size and steps.
        parts: a folder for what is measured so far: a search of the same model, prompts, arguments and recipe goes on
            from there, also for another target. Dense runs are made again.
        progress: told after every run and every forward.

    Raises:
        ValueError: a pipeline of two transformers, no prompts, a folder of another search, or what
            :func:`refuse_search`, ``allocate`` and ``measure_heads`` refuse. A mean density below what any head can
            keep is refused before the runs.
    """
    chosen = presets.resolve(recipe)
    runs = run_arguments(pipe, prompts, generate_kwargs, None)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}.")
    refuse_search(chosen, mean_density=mean_density, max_error=max_error, orders=orders)
    for base in in_orders(chosen, orders):
        for density in densities:
            at_density(base, density)
    models = transformers_of(pipe)
    if len(models) != 1:
        raise ValueError(f"A search is for one transformer, {type(pipe).__name__} has {len(models)}.")
    ((_, model, _),) = models
    probe = PROBE if mean_density is None else min(PROBE, mean_density)
    if parts is not None:
        asked = asked_of(pipe, prompts, chosen, samples, seed, generate_kwargs)
        parts.claim({**asked, "densities": list(densities), "orders": list(orders), "probe": probe})
    inputs: list[dict[str, Any]] = []
    for number, arguments in enumerate(runs):
        progress(Progress(number, len(runs), None, "dense runs"))
        if mean_density is not None and number == 0:
            first = first_input(model, partial(pipe, **begin(arguments, seed)))
            least = least_kept(model, in_orders(chosen, orders), first, min(*densities, probe))
            # What heads keep differs a little from forward to forward: only what none of them comes near is refused.
            if mean_density < least.min():
                check_reachable(mean_density, float(least.mean()))
        keep = first_forwards(pipe, samples, chosen.schedule.dense_fraction)
        inputs += record_inputs(model, partial(pipe, **begin(arguments, seed + number)), keep)
    start = time.perf_counter()

    def measured(done: int, total: int) -> None:
        spent = time.perf_counter() - start
        progress(Progress(done, total, spent / done * (total - done), "heads"))

    errors = measure_heads(
        model,
        chosen,
        inputs,
        densities=densities,
        orders=orders,
        probe=probe,
        mean_density=mean_density,
        parts=parts,
        progress=measured,
    )
    shares = allocate(errors, mean_density=mean_density, max_error=max_error)
    found = with_densities(chosen, shares)
    if orders:
        found = with_orders(found, errors.best_orders(shares))
    kept = errors.kept_at(shares)
    own = errors if errors.by_order is None else replace(errors, error=errors.by_order[0])
    return Found(found, errors, kept, errors.predicted(shares), own.predicted(_uniform(errors, kept)))


def _uniform(errors: HeadErrors, kept: float) -> list[list[float]]:
    """One density for all heads that keeps this share of the blocks."""
    layers, heads, _ = errors.error.shape
    low, high = errors.densities[0], 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if errors.kept_at([[middle] * heads] * layers) < kept else (low, middle)
    return [[high] * heads] * layers


def refuse_search(
    recipe: Recipe, *, mean_density: float | None, max_error: float | None, orders: Sequence[str] = ()
) -> None:
    """Check what can be known of a search before the model is loaded.

    Raises:
        ValueError: neither or both targets, one that cannot be, an unknown order, or a selection without a density
            per head.
    """
    check_target(mean_density, max_error)
    check_select(recipe)
    in_orders(recipe, orders)
