"""What each head's sparsity does to the velocity, measured on the model itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from typing import Any

import torch
from torch import nn

from ..api import patch
from ..call import AttentionCall
from ..engine import Engine, OutputTap
from ..parts import Parts
from ..patches.handle import PatchHandle
from ..plan import AttentionPlan
from ..recipe import Recipe
from .hull import interpolate

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
    check_select(recipe)
    steps = tuple(sorted({*densities, probe, 1.0}))
    bases = in_orders(recipe, orders)
    at_probe = at_density(bases[0], probe)
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
        engines = [[Engine(at_density(base, density), names, "auto", 0) for density in steps[:-1]] for base in bases]
        for one, shares, arguments in zip(curves, kept, inputs, strict=True):
            tap = _curve_tap(next(iter(handle.sessions.values())).engine, engines, one, shares)
            exact.append(forward(tap, handle, arguments))
    check_reachable(mean_density, float(kept[..., 0].mean(0).amin(0).mean()))
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


@torch.no_grad()
def least_kept(model: nn.Module, bases: Sequence[Recipe], arguments: dict[str, Any], density: float) -> torch.Tensor:
    """float64, one for each head of each layer: the share that it keeps in a forward, asked for this density."""
    found = []
    for base in bases:
        shares: list[torch.Tensor] = []

        def see(_: str, call: AttentionCall, shares: list[torch.Tensor] = shares) -> None:
            if call.plan is not None:
                shares.append(_kept_shares(call.plan).cpu())

        with patch(model, at_density(base, density)) as handle, handle.observe(see):
            model(**arguments)
        if not shares:
            raise ValueError("every self-attention layer ran dense: a search needs all of them sparse.")
        found.append(torch.cat(shares))
    return torch.stack(found).amin(0)


def _kept_shares(plan: AttentionPlan) -> torch.Tensor:
    """float64 ``[H]``: what each head keeps of its blocks."""
    return plan.mask.kv_num_blocks.double().mean((0, 2)) / plan.mask.num_blocks[1]


def in_orders(recipe: Recipe, orders: Sequence[str]) -> list[Recipe]:
    """The recipe without its dense phase, in each of the orders, or in its own where there are none."""
    recipe = recipe.with_fields({"schedule": "schedule"})
    return [recipe.with_fields({"order": "axes", "order.axes": ((name,),)}) for name in orders] or [recipe]


def at_density(recipe: Recipe, density: float) -> Recipe:
    """The recipe with one density for all heads."""
    return recipe.with_fields({"select.density": density, "select.head_densities": ()})


def check_select(recipe: Recipe) -> None:
    """Raise ValueError where the recipe's selection takes no density per head, or errors are of whole runs."""
    if recipe.compensate.watches_dense:
        name = type(recipe.compensate).__name__
        raise ValueError(
            f"{name} adds what dense steps of a run kept, and a search runs single forwards: search with another "
            "compensation."
        )
    if not recipe.select.has_head_densities:
        raise ValueError(f"{type(recipe.select).__name__} has no density per head; pooled and mass selections have.")


def check_reachable(mean_density: float | None, lowest: float) -> None:
    """Raise ValueError where a mean density lies below what the heads keep at least."""
    if mean_density is not None and not lowest <= mean_density <= 1.0:
        raise ValueError(
            f"mean_density must lie in [{lowest:.4f}, 1], got {mean_density}: at this size and with these blocks no "
            "less is kept, since every query block reads its own."
        )


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
