"""How to share a budget of blocks among layers and heads, and in which order a head's tokens form blocks, from errors
measured on the model itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, product
from typing import Any

import torch
from torch import nn

from .. import presets
from ..api import patch, transformers_of
from ..call import AttentionCall
from ..engine import Engine, OutputTap
from ..patches.handle import PatchHandle
from ..patches.session import step_index
from ..recipe import Recipe
from .allocate import HeadErrors, allocate, check_reach, check_target, uniform_shares
from .calibrate import Progress
from .runs import begin, run_arguments

DENSITIES = (0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.55, 0.75, 1.0)
# Low: where a head's error is small, what it does to the velocity drowns in the rounding of bfloat16, and heads of
# small errors seem to matter most.
PROBE = 0.1


@torch.no_grad()
def measure_heads(
    model: nn.Module,
    recipe: Recipe,
    inputs: Sequence[dict[str, Any]],
    *,
    densities: Sequence[float] = DENSITIES,
    orders: Sequence[str] = (),
    probe: float = PROBE,
    mean_density: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> HeadErrors:
    """Measure every head of a transformer on recorded inputs.

    Two measurements are multiplied: how the error of a head's own output falls with its density (every density,
    one forward for all heads of all layers, each on the dense model's queries and keys), and what that error
    does to the velocity (one forward for each head, which alone is sparse, at the density ``probe``).

    Args:
        model: a transformer, not patched.
        recipe: with a selection that takes ``head_densities``; its schedule's dense phase is left out.
        inputs: keyword arguments of forwards along the trajectory.
        densities: to measure; 1 is added.
        orders: to measure each head in, some of :data:`~dit_accel.stages.order_axes.HEAD_ORDERS`, in place of the
            recipe's order. What a head's error does to the velocity is measured in the first.
        probe: where a head's effect on the velocity is measured; no higher than the density that is wanted.
        mean_density: that is wanted, to be told before most of the work that it cannot be.
        progress: told forwards done and their number.

    Raises:
        ValueError: the recipe's selection has no density per head, or keeps more than ``mean_density`` at the lowest.
    """
    _check_select(recipe)
    recipe = recipe.with_fields({"schedule": "schedule"})
    steps = tuple(sorted({*densities, probe, 1.0}))
    bases = _in_orders(recipe, orders)
    recipe = bases[0]
    at_probe = _with_density(recipe, probe)
    with patch(model, at_probe) as handle:
        names = [record.name for record in next(iter(handle.sessions.values())).engine.records]
        heads = _count_heads(handle, model, inputs[0])
    layers = len(names)
    total, done = len(inputs) * (1 + layers * heads), 0

    def forward(changed: OutputTap, handle: PatchHandle, arguments: dict[str, Any]) -> torch.Tensor:
        nonlocal done
        with handle.tap_outputs(changed):
            output = model(**arguments)
        done += 1
        progress(done, total)
        return (output[0] if isinstance(output, tuple) else output.sample).double()

    curves = torch.zeros(len(inputs), len(bases), layers, heads, len(steps), dtype=torch.float64)
    kept = torch.ones_like(curves)
    exact = []
    with patch(model, "dense") as handle:
        engines = [[Engine(_with_density(base, density), names, "auto", 0) for density in steps[:-1]] for base in bases]
        for one, shares, arguments in zip(curves, kept, inputs, strict=True):
            tap = _curve_tap(next(iter(handle.sessions.values())).engine, engines, one, shares)
            exact.append(forward(tap, handle, arguments))
    check_reach(float(kept.mean(0)[..., 0].amin(0).mean()), mean_density)
    effect = torch.zeros(len(inputs), layers, heads, dtype=torch.float64)
    for layer in range(layers):
        others = tuple(number for number in range(layers) if number != layer)
        with patch(model, at_probe.with_fields({"schedule.dense_layers": others})) as handle:
            for head, (sample, arguments) in product(range(heads), enumerate(inputs)):
                change = forward(_head_tap(head), handle, arguments) - exact[sample]
                effect[sample, layer, head] = float(change.square().sum() / exact[sample].square().sum())
    gain = effect / curves[:, 0, ..., steps.index(probe)].clamp_min(1e-30)
    by_order = (gain[:, None, ..., None] * curves).mean(0)
    error, best = by_order.min(0)
    kept_there = kept.mean(0).gather(0, best[None])[0]
    return HeadErrors(steps, kept_there, error, tuple(orders), by_order if orders else None)


def with_densities(recipe: Recipe, head_densities: tuple[tuple[float, ...], ...]) -> Recipe:
    """The recipe with a density per head, and their mean in its density."""
    shares = [share for layer in head_densities for share in layer]
    mean = round(sum(shares) / len(shares), 6)
    return recipe.with_fields({"select.density": mean, "select.head_densities": head_densities})


def with_orders(recipe: Recipe, orders: tuple[tuple[str, ...], ...]) -> Recipe:
    """The recipe with an order per layer and head, some of :data:`~dit_accel.stages.order_axes.HEAD_ORDERS`."""
    return recipe.with_fields({"order": "axes", "order.axes": orders})


@dataclass(frozen=True, eq=False)
class Found:
    """What :func:`search` found.

    Attributes:
        recipe: with a density, and where orders were given an order, per layer and head.
        errors: what was measured; further targets need only :func:`allocate`.
        density: mean share of the blocks that it keeps.
        predicted_error: relative error of the velocity, if errors of heads are independent.
        predicted_uniform: the same with one density for all heads, that of ``density``, in the first order.
    """

    recipe: Recipe
    errors: HeadErrors
    density: float
    predicted_error: float
    predicted_uniform: float


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
    progress: Callable[[Progress], None] = lambda state: None,
) -> Found:
    """Find a density, and an order if there is a choice, for every head of a pipeline's transformer.

    Dense runs of the prompts give the forwards that heads are measured on, see :func:`measure_heads`; their number
    is that of heads times prompts times ``samples``. Every transformer forward of a sampled step counts as one: a
    pipeline that runs its guidance branches one by one is measured on the first.

    Args:
        pipe: a diffusers pipeline with one transformer, not patched.
        prompts: texts, or arguments of the pipeline's call in place of one.
        recipe: a :class:`~dit_accel.Recipe` or a preset's name, whose selection takes a density per head.
        mean_density, max_error: the target, see :func:`allocate`.
        orders: that heads may choose from, see :func:`measure_heads`; none keeps the recipe's order.
        samples: denoising steps measured, spread over those after the recipe's dense phase.
        densities: see :func:`measure_heads`.
        seed: of the first prompt's run; each further one adds 1.
        generate_kwargs: further arguments of the pipeline's call, such as size and steps.
        progress: told after every run and every forward.

    Raises:
        ValueError: a pipeline of two transformers, what :func:`~dit_accel.calibration.runs.run_arguments` refuses, no
            or several targets: before the first run. A mean density that the recipe cannot come down to: before heads
            are measured one by one.
    """
    chosen = presets.resolve(recipe)
    seeds = range(seed, seed + len(prompts))
    runs = run_arguments(pipe, prompts, generate_kwargs, None)
    check_target(mean_density, max_error)
    _check_select(chosen)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}.")
    for base in _in_orders(chosen, orders):
        for density in densities:
            _with_density(base, density)
    models = transformers_of(pipe)
    if len(models) != 1:
        raise ValueError(f"A search is for one transformer, {type(pipe).__name__} has {len(models)}.")
    ((_, model, _),) = models
    inputs: list[dict[str, Any]] = []
    for number, arguments in enumerate(runs):
        progress(Progress(number, len(prompts), None, "dense runs"))
        keep = _first_forwards(pipe, samples, chosen.schedule.dense_fraction)
        inputs += record_inputs(model, partial(pipe, **begin(arguments, seeds[number])), keep)
    start = time.perf_counter()

    def measured(done: int, total: int) -> None:
        spent = time.perf_counter() - start
        progress(Progress(done, total, spent / done * (total - done), "heads"))

    probe = PROBE if mean_density is None else min(PROBE, mean_density)
    errors = measure_heads(
        model,
        chosen,
        inputs,
        densities=densities,
        orders=orders,
        probe=probe,
        mean_density=mean_density,
        progress=measured,
    )
    shares = allocate(errors, mean_density=mean_density, max_error=max_error)
    found = with_densities(chosen, shares)
    if orders:
        found = with_orders(found, errors.best_orders(shares))
    kept = errors.kept_at(shares)
    first = errors if errors.by_order is None else replace(errors, error=errors.by_order[0])
    return Found(found, errors, kept, errors.predicted(shares), first.predicted(uniform_shares(errors, kept)))


def _first_forwards(pipe: Any, samples: int, dense_fraction: float) -> Callable[[int], bool]:
    """Says of each forward of a run whether it is the first one of a sampled step."""
    seen: set[int] = set()

    def keep(_: int) -> bool:
        timesteps = pipe.scheduler.timesteps
        steps = len(timesteps)
        places = [dense_fraction + (n + 0.5) / samples * (1.0 - dense_fraction) for n in range(samples)]
        wanted = {min(int(place * steps), steps - 1) for place in places}
        index = step_index(pipe, pipe.scheduler, timesteps)
        if index in seen or index not in wanted:
            return False
        seen.add(index)
        return True

    return keep


def record_inputs(model: nn.Module, run: Callable[[], Any], keep: Callable[[int], bool]) -> list[dict[str, Any]]:
    """Arguments of the forwards of a run for which ``keep(number of the forward)``, tensors on their device."""
    found: list[dict[str, Any]] = []
    count = 0

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal count
        if args:
            raise ValueError(f"{type(module).__name__} was called with positional arguments, which are not recorded.")
        if keep(count):
            found.append({name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()})
        count += 1

    handle = model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return found


def _check_select(recipe: Recipe) -> None:
    if not hasattr(recipe.select, "head_densities"):
        raise ValueError(f"{type(recipe.select).__name__} has no density per head; pooled and mass selections have.")


def _in_orders(recipe: Recipe, orders: Sequence[str]) -> list[Recipe]:
    return [recipe.with_fields({"order": "axes", "order.axes": ((name,),)}) for name in orders] or [recipe]


def _with_density(recipe: Recipe, density: float) -> Recipe:
    return recipe.with_fields({"select.density": density, "select.head_densities": ()})


def _count_heads(handle: PatchHandle, model: nn.Module, arguments: dict[str, Any]) -> int:
    seen: list[int] = []

    def tap(layer: int, out: torch.Tensor, dense: Callable[[], torch.Tensor] | None) -> torch.Tensor:
        if dense is None:
            raise ValueError(f"self-attention layer {layer} ran dense: a search needs all of them sparse.")
        seen.append(out.shape[2])
        return out

    with handle.tap_outputs(tap):
        model(**arguments)
    if len(set(seen)) != 1:
        raise ValueError(f"a search needs layers with one number of heads, got {sorted(set(seen))}.")
    return seen[0]


def _curve_tap(
    dense: Engine, sparse: Sequence[Sequence[Engine]], curves: torch.Tensor, kept: torch.Tensor
) -> OutputTap:
    """Leaves outputs as they are; ``curves [orders, layers, heads, densities]`` gets each head's squared error, and
    ``kept`` its density."""
    calls: dict[int, AttentionCall] = {}
    for engine in (dense, *chain.from_iterable(sparse)):
        engine.observer = lambda call: calls.__setitem__(call.layer, call)

    def tap(layer: int, out: torch.Tensor, model_own: Callable[[], torch.Tensor] | None) -> torch.Tensor:
        call = calls.pop(layer)
        for (order, engines), place in product(enumerate(sparse), range(len(sparse[0]))):
            engine = engines[place]
            found = engine.attend(
                layer, call.q, call.k, call.v, call.key_mask, call.scale, call.layout, call.step, lambda: out
            )
            plan = calls.pop(layer).plan
            assert plan is not None
            kept[order, layer, :, place] = (
                plan.mask.kv_num_blocks.double().mean((0, 2)) / plan.mask.num_blocks[1]
            ).cpu()
            curves[order, layer, :, place] = (found.double() - out.double()).square().sum((0, 1, 3)).cpu()
        return out

    return tap


def _head_tap(head: int) -> OutputTap:
    """Keeps one head's sparse output, in layers that have one."""

    def tap(layer: int, out: torch.Tensor, dense: Callable[[], torch.Tensor] | None) -> torch.Tensor:
        if dense is None:
            return out
        exact = dense().clone()
        exact[:, :, head] = out[:, :, head]
        return exact

    return tap
