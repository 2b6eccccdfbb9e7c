"""How to share a budget of blocks among layers and heads, from errors measured on the model itself."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn

from ..api import patch
from ..engine import AttentionCall, Engine, OutputTap
from ..patches.handle import PatchHandle
from ..recipe import Recipe

DENSITIES = (0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.55, 0.75, 1.0)


@dataclass(frozen=True, eq=False)
class HeadErrors:
    """What each head's sparsity does to the velocity.

    Attributes:
        densities: asked of the recipe, rising to 1.
        kept: float64 ``[layers, heads, densities]``: what the recipe then kept, own and rounded-up blocks included.
        error: float64 ``[layers, heads, densities]``: mean squared norm of what a head at this density changes in
            the velocity, alone, as a share of the velocity's own squared norm.
    """

    densities: tuple[float, ...]
    kept: torch.Tensor
    error: torch.Tensor

    def predicted(self, head_densities: Sequence[Sequence[float]]) -> float:
        """Relative error of the velocity if errors of single heads added up as independent ones do."""
        return max(sum(self._at(self.error, head_densities)), 0.0) ** 0.5

    def kept_at(self, head_densities: Sequence[Sequence[float]]) -> float:
        """Mean density that the recipe would really keep."""
        found = self._at(self.kept, head_densities)
        return sum(found) / len(found)

    def _at(self, curves: torch.Tensor, head_densities: Sequence[Sequence[float]]) -> list[float]:
        return [
            _interpolate(self.densities, curve, density)
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
    probe: float = 0.2,
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
        probe: where a head's effect on the velocity is measured.
        progress: told forwards done and their number.

    Raises:
        ValueError: the recipe's selection has no density per head.
    """
    if not hasattr(recipe.select, "head_densities"):
        raise ValueError(f"{type(recipe.select).__name__} has no density per head; pooled and mass selections have.")
    recipe = recipe.with_fields({"schedule": "schedule"})
    steps = tuple(sorted({*densities, probe, 1.0}))
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

    curves = torch.zeros(len(inputs), layers, heads, len(steps), dtype=torch.float64)
    kept = torch.ones_like(curves)
    exact = []
    with patch(model, "dense") as handle:
        engines = [Engine(_with_density(recipe, density), names, "auto", 0) for density in steps[:-1]]
        for one, shares, arguments in zip(curves, kept, inputs, strict=True):
            tap = _curve_tap(next(iter(handle.sessions.values())).engine, engines, one, shares)
            exact.append(forward(tap, handle, arguments))
    effect = torch.zeros(len(inputs), layers, heads, dtype=torch.float64)
    for layer in range(layers):
        others = tuple(number for number in range(layers) if number != layer)
        with patch(model, at_probe.with_fields({"schedule.dense_layers": others})) as handle:
            for head, (sample, arguments) in product(range(heads), enumerate(inputs)):
                change = forward(_head_tap(head), handle, arguments) - exact[sample]
                effect[sample, layer, head] = float(change.square().sum() / exact[sample].square().sum())
    gain = effect / curves[..., steps.index(probe)].clamp_min(1e-30)
    return HeadErrors(steps, kept.mean(0), (gain[..., None] * curves).mean(0))


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
    if (mean_density is None) == (max_error is None):
        raise ValueError(f"give mean_density or max_error, got {mean_density} and {max_error}.")
    layers, heads, _ = errors.error.shape
    hulls = {
        (layer, head): _hull(errors.densities, errors.kept[layer, head].tolist(), errors.error[layer, head].tolist())
        for layer, head in product(range(layers), range(heads))
    }
    lowest = sum(hull[0].kept for hull in hulls.values()) / len(hulls)
    if mean_density is not None and not lowest <= mean_density <= 1.0:
        raise ValueError(f"mean_density must lie in [{lowest:.4f}, 1], got {mean_density}.")
    chosen = [[hulls[layer, head][0].asked for head in range(heads)] for layer in range(layers)]
    queue = [(_slope(hull, 0), layer, head, 0) for (layer, head), hull in hulls.items() if len(hull) > 1]
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
            heapq.heappush(queue, (_slope(hulls[layer, head], place + 1), layer, head, place + 1))
    return tuple(tuple(round(share, 6) for share in row) for row in chosen)


def with_densities(recipe: Recipe, head_densities: tuple[tuple[float, ...], ...]) -> Recipe:
    """The recipe with a density per head, and their mean in its density."""
    shares = [share for layer in head_densities for share in layer]
    mean = round(sum(shares) / len(shares), 6)
    return recipe.with_fields({"select.density": mean, "select.head_densities": head_densities})


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


def _curve_tap(dense: Engine, sparse: Sequence[Engine], curves: torch.Tensor, kept: torch.Tensor) -> OutputTap:
    """Leaves outputs as they are; ``curves [layers, heads, densities]`` gets each head's squared error, and
    ``kept`` its density."""
    calls: dict[int, AttentionCall] = {}
    for engine in (dense, *sparse):
        engine.observer = lambda call: calls.__setitem__(call.layer, call)

    def tap(layer: int, out: torch.Tensor, model_own: Callable[[], torch.Tensor] | None) -> torch.Tensor:
        call = calls.pop(layer)
        for place, engine in enumerate(sparse):
            found = engine.attend(
                layer, call.q, call.k, call.v, call.key_mask, call.scale, call.layout, call.step, lambda: out
            )
            plan = calls.pop(layer).plan
            assert plan is not None
            kept[layer, :, place] = (plan.mask.kv_num_blocks.double().mean((0, 2)) / plan.mask.num_blocks[1]).cpu()
            curves[layer, :, place] = (found.double() - out.double()).square().sum((0, 1, 3)).cpu()
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


@dataclass(frozen=True)
class _Point:
    """One density of a head: asked, kept, and its error."""

    asked: float
    kept: float
    error: float


def _hull(asked: Sequence[float], kept: Sequence[float], errors: Sequence[float]) -> list[_Point]:
    """The lower convex hull of a falling curve, from its first point to its lowest."""
    points: list[_Point] = []
    for point in map(_Point, asked, kept, errors):
        if points and (point.error >= points[-1].error or point.kept <= points[-1].kept):
            continue  # more blocks that do not help are no choice
        while len(points) > 1 and _rise(points[-2], points[-1]) >= _rise(points[-1], point):
            points.pop()
        points.append(point)
    return points


def _rise(left: _Point, right: _Point) -> float:
    return (right.error - left.error) / (right.kept - left.kept)


def _slope(hull: list[_Point], place: int) -> float:
    return _rise(*hull[place : place + 2])


def _interpolate(densities: Sequence[float], curve: Sequence[float], density: float) -> float:
    for left in range(len(densities) - 1):
        if density <= densities[left + 1]:
            share = (density - densities[left]) / (densities[left + 1] - densities[left])
            return curve[left] + max(share, 0.0) * (curve[left + 1] - curve[left])
    return curve[-1]
