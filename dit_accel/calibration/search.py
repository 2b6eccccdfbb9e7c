"""How to share a budget of blocks among layers and heads, and in which order a head's tokens form blocks, from errors
measured on the model itself."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, product
from typing import Any

import torch
from torch import nn

from .. import presets
from ..api import patch
from ..call import AttentionCall
from ..engine import Engine, OutputTap
from ..parts import Parts
from ..patches.handle import PatchHandle
from ..patches.said_once import said_once
from ..patches.targets import transformers_of
from ..plan import AttentionPlan
from ..recipe import Recipe
from .calibrate import Progress
from .hull import interpolate, lower_hull, slope
from .recording import first_forwards, first_input, record_inputs
from .runs import asked_of, begin, run_arguments

DENSITIES = (0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.55, 0.75, 1.0)
# Low: where a head's error is small, what it does to the velocity drowns in the rounding of bfloat16, and heads of
# small errors seem to matter most.
PROBE = 0.1


@dataclass(frozen=True, eq=False)
class HeadErrors:
    """What each head's sparsity does to the velocity.

    Attributes:
        densities: asked of the recipe, rising to 1.
        kept: float64 ``[layers, heads, densities]``: what the recipe then kept, own and rounded-up blocks included.
        error: float64 ``[layers, heads, densities]``: mean squared norm of what a head at this density changes in
            the velocity, alone, as a share of the velocity's own squared norm; in the best order there.
        orders: the orders that heads may choose from; empty where the recipe's own serves all.
        by_order: float64 ``[orders, layers, heads, densities]``, the errors in each of them.
    """

    densities: tuple[float, ...]
    kept: torch.Tensor
    error: torch.Tensor
    orders: tuple[str, ...] = ()
    by_order: torch.Tensor | None = None

    def predicted(self, head_densities: Sequence[Sequence[float]]) -> float:
        """Relative error of the velocity if errors of single heads added up as independent ones do."""
        return max(sum(self._at(self.error, head_densities)), 0.0) ** 0.5

    def kept_at(self, head_densities: Sequence[Sequence[float]]) -> float:
        """Mean density that the recipe would really keep."""
        found = self._at(self.kept, head_densities)
        return sum(found) / len(found)

    def best_orders(self, head_densities: Sequence[Sequence[float]]) -> tuple[tuple[str, ...], ...]:
        """The order of every head with the least error at its density; the first one named where orders tie."""
        assert self.by_order is not None
        each = torch.tensor([self._at(curves, head_densities) for curves in self.by_order])
        names = [self.orders[int(place)] for place in each.argmin(0)]
        heads = len(head_densities[0])
        return tuple(tuple(names[first : first + heads]) for first in range(0, len(names), heads))

    def _at(self, curves: torch.Tensor, head_densities: Sequence[Sequence[float]]) -> list[float]:
        return [
            interpolate(self.densities, curve, density)
            for row, densities in zip(curves.tolist(), head_densities, strict=True)
            for curve, density in zip(row, densities, strict=True)
        ]


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
    parts: Parts | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
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
        orders: to measure each head in, some of :data:`~dit_accel.stages.order.axes.HEAD_ORDERS`, in place of the
            recipe's order. What a head's error does to the velocity is measured in the first.
        probe: where a head's effect on the velocity is measured; no higher than the density that is wanted.
        mean_density: that is wanted, refused before the second, long measurement if it cannot be kept; None for any.
        parts: where the effects of each layer's heads are kept, in a folder that was claimed for these very inputs:
            layers that are there are not measured again. None keeps none.
        progress: told forwards done and their number, of those that are to be run.

    Raises:
        ValueError: the recipe's selection has no density per head, or a mean density below the lowest measured.
    """
    _check_select(recipe)
    steps = tuple(sorted({*densities, probe, 1.0}))
    bases = _in_orders(recipe, orders)
    at_probe = _with_density(bases[0], probe)
    with patch(model, at_probe) as handle:
        names = [record.name for record in next(iter(handle.sessions.values())).engine.records]
        heads = _count_heads(handle, model, inputs[0])
    layers = len(names)
    known = {layer: kept for layer in range(layers) if parts and (kept := parts.read(_part(layer))) is not None}
    total, done = len(inputs) * (1 + (layers - len(known)) * heads), 0

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
    _check_reachable(mean_density, float(kept[..., 0].mean(0).amin(0).mean()))
    effect = torch.zeros(len(inputs), layers, heads, dtype=torch.float64)
    for layer in range(layers):
        if layer in known:
            effect[:, layer] = torch.tensor(known[layer], dtype=torch.float64)
            continue
        others = tuple(number for number in range(layers) if number != layer)
        with patch(model, at_probe.with_fields({"schedule.dense_layers": others})) as handle:
            for head, (sample, arguments) in product(range(heads), enumerate(inputs)):
                change = forward(_head_tap(head), handle, arguments) - exact[sample]
                effect[sample, layer, head] = float(change.square().sum() / exact[sample].square().sum())
        if parts is not None:
            parts.write(_part(layer), effect[:, layer].tolist())
    gain = effect / curves[:, 0, ..., steps.index(probe)].clamp_min(1e-30)
    by_order = (gain[:, None, ..., None] * curves).mean(0)
    error, best = by_order.min(0)
    kept_there = kept.mean(0).gather(0, best[None])[0]
    return HeadErrors(steps, kept_there, error, tuple(orders), by_order if orders else None)


def _part(layer: int) -> str:
    """Name of what is kept of a layer."""
    return f"layer-{layer:03d}"


def allocate(
    errors: HeadErrors, *, mean_density: float | None = None, max_error: float | None = None
) -> tuple[tuple[float, ...], ...]:
    """Densities per layer and head with the least predicted error: greedy on each head's convex hull.

    On convex curves the greedy choice, always the steepest fall of error per block, is optimal. Every head begins
    at the lowest density measured.

    Args:
        mean_density: over all heads, to spend.
        max_error: relative error of the velocity to come down to, with as few blocks as possible.

    Returns:
        ``head_densities`` of a selection.

    Raises:
        ValueError: neither or both targets, or a mean density below the lowest measured.
    """
    _check_target(mean_density, max_error)
    layers, heads, _ = errors.error.shape
    kept, error = errors.kept.tolist(), errors.error.tolist()
    hulls = {
        (layer, head): lower_hull(errors.densities, kept[layer][head], error[layer][head])
        for layer, head in product(range(layers), range(heads))
    }
    lowest = sum(hull[0].kept for hull in hulls.values()) / len(hulls)
    _check_reachable(mean_density, lowest)
    chosen = [[hulls[layer, head][0].asked for head in range(heads)] for layer in range(layers)]
    queue = [(slope(hull, 0), layer, head, 0) for (layer, head), hull in hulls.items() if len(hull) > 1]
    heapq.heapify(queue)
    budget = None if mean_density is None else (mean_density - lowest) * layers * heads
    left = sum(hull[0].error for hull in hulls.values())
    goal = 0.0 if max_error is None else max_error**2
    while queue:
        _, layer, head, place = heapq.heappop(queue)
        here, there = hulls[layer, head][place : place + 2]
        share, gain = 1.0, here.error - there.error
        if budget is not None:
            share = min(1.0, budget / (there.kept - here.kept))
            budget -= share * (there.kept - here.kept)
        elif left - goal < gain:
            share = max(0.0, (left - goal) / gain)
        chosen[layer][head] = here.asked + share * (there.asked - here.asked)
        left -= share * gain
        if share < 1.0:
            break
        if place + 2 < len(hulls[layer, head]):
            heapq.heappush(queue, (slope(hulls[layer, head], place + 1), layer, head, place + 1))
    return tuple(tuple(round(share, 6) for share in row) for row in chosen)


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
        parts: a folder for what is measured so far: a search of the same model, prompts, arguments and recipe goes on
            from there, also for another target. Dense runs are made again.
        progress: told after every run and every forward.

    Raises:
        ValueError: a pipeline of two transformers, no prompts, a folder of another search, or what
            :func:`refuse_search`, :func:`allocate` and :func:`measure_heads` refuse. A mean density below what any head
            can keep is refused before the runs.
    """
    chosen = presets.resolve(recipe)
    runs = run_arguments(pipe, prompts, generate_kwargs, None)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}.")
    refuse_search(chosen, mean_density=mean_density, max_error=max_error, orders=orders)
    for base in _in_orders(chosen, orders):
        for density in densities:
            _with_density(base, density)
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
            least = _least_kept(model, _in_orders(chosen, orders), first, min(*densities, probe))
            # What heads keep differs a little from forward to forward: only what none of them comes near is refused.
            if mean_density < least.min():
                _check_reachable(mean_density, float(least.mean()))
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


@torch.no_grad()
def _least_kept(model: nn.Module, bases: Sequence[Recipe], arguments: dict[str, Any], density: float) -> torch.Tensor:
    """float64, one for each head of each layer: the share that it keeps in a forward, asked for this density."""
    found = []
    for base in bases:
        shares: list[torch.Tensor] = []

        def see(_: str, call: AttentionCall, shares: list[torch.Tensor] = shares) -> None:
            if call.plan is not None:
                shares.append(_kept_shares(call.plan).cpu())

        with patch(model, _with_density(base, density)) as handle, handle.observe(see):
            model(**arguments)
        if not shares:
            raise ValueError("every self-attention layer ran dense: a search needs all of them sparse.")
        found.append(torch.cat(shares))
    return torch.stack(found).amin(0)


def _kept_shares(plan: AttentionPlan) -> torch.Tensor:
    """float64 ``[H]``: what each head keeps of its blocks."""
    return plan.mask.kv_num_blocks.double().mean((0, 2)) / plan.mask.num_blocks[1]


def refuse_search(
    recipe: Recipe, *, mean_density: float | None, max_error: float | None, orders: Sequence[str] = ()
) -> None:
    """Check what can be known of a search before the model is loaded.

    Raises:
        ValueError: neither or both targets, one that cannot be, an unknown order, or a selection without a density
            per head.
    """
    _check_target(mean_density, max_error)
    _check_select(recipe)
    _in_orders(recipe, orders)


def _in_orders(recipe: Recipe, orders: Sequence[str]) -> list[Recipe]:
    """The recipe without its dense phase, in each of the orders, or in its own where there are none."""
    recipe = recipe.with_fields({"schedule": "schedule"})
    return [recipe.with_fields({"order": "axes", "order.axes": ((name,),)}) for name in orders] or [recipe]


def _check_reachable(mean_density: float | None, lowest: float) -> None:
    if mean_density is not None and not lowest <= mean_density <= 1.0:
        raise ValueError(
            f"mean_density must lie in [{lowest:.4f}, 1], got {mean_density}: at this size and with these blocks no "
            "less is kept, since every query block reads its own."
        )


def _check_select(recipe: Recipe) -> None:
    if not recipe.select.has_head_densities:
        raise ValueError(f"{type(recipe.select).__name__} has no density per head; pooled and mass selections have.")


def _check_target(mean_density: float | None, max_error: float | None) -> None:
    if (mean_density is None) == (max_error is None):
        raise ValueError(f"give mean_density or max_error, got {mean_density} and {max_error}.")
    if mean_density is not None and not 0.0 < mean_density <= 1.0:
        raise ValueError(f"mean_density must lie in (0, 1], got {mean_density}.")
    if max_error is not None and not 0.0 < max_error < float("inf"):
        raise ValueError(f"max_error must be above 0 and finite, got {max_error}.")


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

    def tap(layer: int, out: torch.Tensor, _model_own: Callable[[], torch.Tensor] | None) -> torch.Tensor:
        call = calls.pop(layer)
        for (order, engines), place in product(enumerate(sparse), range(len(sparse[0]))):
            engine = engines[place]
            found = engine.attend(replace(call, run=engine.run, used={}), lambda: out)
            plan = calls.pop(layer).plan
            assert plan is not None
            kept[order, layer, :, place] = _kept_shares(plan).cpu()
            curves[order, layer, :, place] = (found.double() - out.double()).square().sum((0, 1, 3)).cpu()
        return out

    return tap


def _head_tap(head: int) -> OutputTap:
    """Keeps one head's sparse output, in layers that have one."""

    def tap(_layer: int, out: torch.Tensor, dense: Callable[[], torch.Tensor] | None) -> torch.Tensor:
        if dense is None:
            return out
        exact = dense().clone()
        exact[:, :, head] = out[:, :, head]
        return exact

    return tap
