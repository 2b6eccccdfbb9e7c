"""Every preset at an asked density, for the fidelity sweep: which field sets the density, and how it is found.

All share one dense phase (the first fifth of the steps) and have no dense layers, so that the density is the only
thing that differs between two rows of a method, and the method the only thing between two rows of a density.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from dit_accel import Recipe, presets
from dit_accel.call import AttentionCall, AttentionInputs
from dit_accel.engine import Engine
from dit_accel.layout import TokenLayout
from dit_accel.stages.schedule import Schedule
from dit_accel.stages.select.mass import Mass

DENSE = 0.2
# AdaSpa and SparseD compute the step of a search densely: after a tenth of ten steps, that is a fifth in all.
SEARCH = 0.1


@dataclass(frozen=True)
class Method:
    """A preset with one free setting.

    Attributes:
        name: of the row.
        build: the recipe for a value of the setting.
        span: lowest and highest value of a setting that density grows with; None where it is the density itself.
        values: instead of a span, the values to try on a grid for a density.
        fixed: whether there is nothing to set, so that one row serves all densities.
        calibrated: whether plans are made offline, from prompts that the comparison does not use.
        note: for the reader of the table.
    """

    name: str
    build: Callable[..., Recipe]
    span: tuple[float, float] | None = None
    values: Callable[[tuple[int, int, int], float], list[object]] | None = None
    fixed: bool = False
    calibrated: bool = False
    note: str = ""

    @property
    def is_fitted(self) -> bool:
        """Whether the setting is found on recorded queries and keys."""
        return self.span is not None or self.values is not None


def _tile_windows(grid: tuple[int, int, int], density: float) -> list[object]:
    """The windows in tiles of (4, 4, 4) that come nearest to a density, alike in height and width."""
    frames, height, width = (-(-size // 4) for size in grid)
    shares = {
        (f, h, w): f * h * w / (frames * height * width)
        for f, h in product(range(1, frames + 1), range(1, height + 1))
        for w in {max(1, h * width // height), min(width, -(-h * width // height))}
    }
    return sorted(shares, key=lambda window: abs(shares[window] - density))[:3]


def _agent_tiles(_grid: tuple[int, int, int], density: float) -> list[object]:
    """The tiles whose agents make the number of products come nearest: two agents times tokens."""
    tiles = [tile for tile in product((1, 2, 4), repeat=3) if tile[0] * tile[1] * tile[2] > 2 and tile[1] <= tile[2]]
    return sorted(tiles, key=lambda tile: abs(2 / (tile[0] * tile[1] * tile[2]) - density))[:4]


METHODS = (
    Method("mass", lambda x: presets.mass(density=x, dense_fraction=DENSE)),
    Method("ear", lambda x: presets.ear(density=x, dense_fraction=DENSE)),
    Method("pooled", lambda x: presets.pooled(density=x, dense_fraction=DENSE)),
    Method("adaspa", lambda x: presets.adaspa(density=x, search_at=(SEARCH,)), note="one search"),
    Method("sparsed", lambda x: presets.sparsed(density=x, search_at=SEARCH)),
    Method("rectified", lambda x: _rectified(x), (0.001, 0.9), note="first frame not forced"),
    Method(
        "rectified-default",
        lambda: presets.rectified(dense_fraction=DENSE, dense_layers=()),
        fixed=True,
        note="the preset's own floor: shares of the blocks and of the mass, neighbours and the first frame",
    ),
    Method("rectified-alone", lambda x: _rectified(x).with_fields({"compensate": "none"}), (0.001, 0.9)),
    Method("rectified-residual", lambda x: _residual(_rectified(x)), (0.001, 0.9)),
    Method("psa", lambda x: _psa(x), (0.02, 1.6), note="bounds of the energy scaled"),
    Method("pbs", lambda x: presets.pbs(top_p=x, dense_fraction=DENSE), (0.005, 0.995)),
    Method("vmoba", lambda x: presets.vmoba(threshold=x, dense_fraction=DENSE), (0.01, 0.99)),
    Method("sparge", lambda x: presets.sparge(top_p=x, dense_fraction=DENSE), (0.001, 0.999), note="gated, by mass"),
    Method(
        "sparge-topk",
        lambda x: presets.sparge(top_p=None, density=x, similarity=-1.0, dense_fraction=DENSE),
        note="gate off",
    ),
    Method("na", lambda x: presets.na(window=(1.0, x, x), dense_fraction=DENSE), (0.05, 1.0)),
    Method("gna", lambda x: presets.gna(window=(1.0, x, x), dense_fraction=DENSE), (0.17, 1.0)),
    Method("dina", lambda x: presets.dina(window=(1.0, x, x), dense_fraction=DENSE), (0.05, 0.5)),
    Method("sta", lambda x: presets.sta(window=x, tile=(4, 4, 4), dense_fraction=DENSE), values=_tile_windows),
    Method("clear", lambda x: presets.clear(radius=x, dense_fraction=DENSE), (1.0, 34.0), note="untrained"),
    Method("radial", lambda x: presets.radial(decay=x, dense_fraction=DENSE, dense_layers=()), (0.005, 1.0)),
    Method("sparge2", lambda x: _dense_first(presets.sparge2(density=x, top_p=None)), note="untrained"),
    Method("ssa", lambda x: _dense_first(presets.ssa(density=x)), note="untrained"),
    Method("sla", lambda x: _dense_first(presets.sla(density=x)), note="untrained: its linear branch adds nothing"),
    Method("paro", lambda x: _paro(x, "int8"), calibrated=True, note="INT8"),
    Method("paro-bf16", lambda x: _paro(x, "model"), calibrated=True, note="without quantisation"),
    Method("pooled-frozen", lambda x: presets.pooled(x, dense_fraction=DENSE), calibrated=True),
    Method("adaspa-frozen", lambda x: presets.adaspa(x, search_at=(DENSE,)), calibrated=True),
    Method("pooled-64", lambda x: _pooled(x, block=(64, 64)), note="blocks of 64 queries"),
    Method("pooled-once", lambda x: _pooled(x).with_fields({"schedule.refresh_every": 100}), note="one plan a run"),
    Method("pooled-drift", lambda x: _drift(_pooled(x)), note="a plan where means moved by 0.1"),
    Method("adaspa-drift", lambda x: _drift(_each_step(x)), note="the same with AdaSpa's score"),
    Method("adaspa-each-step", lambda x: _each_step(x), note="AdaSpa's score, a plan every step, one density"),
    Method("mass-each-step", lambda x: _each_step(x).with_fields({"order": "tiles"}), note="the same in tile order"),
    Method("adaspa-even", lambda x: _even(x), note="one search, one density for all heads"),
    Method(
        "mass-64", lambda x: presets.mass(density=x, dense_fraction=DENSE, block=(64, 64)), note="blocks of 64 queries"
    ),
    Method("pooled-residual", lambda x: _residual(_pooled(x)), note="left-out blocks as one key"),
    Method("pooled-64-residual", lambda x: _residual(_pooled(x, block=(64, 64)))),
    Method("adaspa-residual", lambda x: _residual(presets.adaspa(x, search_at=(SEARCH,)))),
    Method("paro-residual", lambda x: _residual(_paro(x, "int8")), calibrated=True),
    Method("paro-int8-values", lambda x: _paro(x, "int8_int8"), calibrated=True, note="weights and values INT8"),
    Method("paro-int4-values", lambda x: _paro(x, "int8_int4"), calibrated=True, note="weights INT8, values INT4"),
    Method("sparge-default", lambda: presets.sparge(dense_fraction=DENSE), fixed=True, note="0.98 of the mass"),
    Method("agent", lambda x: presets.agent(tile=x, dense_fraction=DENSE), values=_agent_tiles),
    Method("sage", lambda: presets.sage(dense_fraction=DENSE), fixed=True),
    Method("sage-fp8", lambda: presets.sage(values="fp8", dense_fraction=DENSE), fixed=True),
    Method("adaspa-int8", lambda x: presets.adaspa(x, search_at=(SEARCH,)).with_fields({"precision": "int8"})),
    Method("adaspa-2", lambda x: presets.adaspa(density=x, search_at=(SEARCH, 0.6)), note="two searches: 30% dense"),
)


# PARO's corrected score at several weights, which the paper never ablated: without INT8, whose error is not asked for.
WEIGHTS = tuple(
    Method(f"paro-w{weight:g}", lambda x, weight=weight: _paro(x, "model", weight), calibrated=True)
    for weight in (0.0, 0.25, 0.5, 0.75, 1.0)
)


def _psa(scale: float) -> Recipe:
    first, second, third, fourth = (min(1.0, bound * scale) for bound in (0.5, 0.6, 0.7, 0.8))
    return presets.psa(
        cumulative=(first, second, third, fourth), min_full=min(0.06, 0.12 * scale), dense_fraction=DENSE
    )


def _paro(density: float, precision: str, sparse_weight: float = 0.5) -> Recipe:
    return presets.paro(density, sparse_weight, precision=precision, dense_fraction=DENSE)


def _rectified(density: float) -> Recipe:
    recipe = presets.rectified(density, top_p=1e-6, dense_fraction=DENSE, dense_layers=())
    return recipe.with_fields({"select.sink_first_frame": False})


def _pooled(density: float, block: tuple[int, int] = (128, 64)) -> Recipe:
    return presets.pooled(density, dense_fraction=DENSE).with_fields({"select.block": block})


def _even(density: float) -> Recipe:
    return presets.adaspa(density, search_at=(SEARCH,), head_adaptive=False)


def _each_step(density: float) -> Recipe:
    select = Mass(density=density, head_adaptive=False)
    return Recipe(select=select, schedule=Schedule(dense_fraction=DENSE))


def _drift(recipe: Recipe) -> Recipe:
    return recipe.with_fields({"schedule.drift_bound": 0.1})


def _residual(recipe: Recipe) -> Recipe:
    return recipe.with_fields({"compensate": "residual"})


def _dense_first(recipe: Recipe) -> Recipe:
    return recipe.with_fields({"schedule.dense_fraction": DENSE})


def method(name: str) -> Method:
    """A method by the name of its row.

    Raises:
        ValueError: unknown name.
    """
    for known in (*METHODS, *WEIGHTS):
        if known.name == name:
            return known
    raise ValueError(f"Unknown method {name!r}; known are {', '.join(known.name for known in (*METHODS, *WEIGHTS))}.")


def at_density(chosen: Method, density: float, calls: Sequence[AttentionCall]) -> Recipe:
    """The method's recipe whose density on recorded calls comes nearest to the asked one."""
    if chosen.fixed:
        return chosen.build()
    if chosen.values is not None:
        layout = calls[0].layout
        assert isinstance(layout, TokenLayout)
        recipes = [chosen.build(value) for value in chosen.values(layout.grid, density)]
        return min(recipes, key=lambda recipe: abs(density_on(recipe, calls) - density))
    if chosen.span is None:
        return chosen.build(density)
    low, high = chosen.span
    for _ in range(9):
        middle = (low + high) / 2
        if density_on(chosen.build(middle), calls) < density:
            low = middle
        else:
            high = middle
    ends = [chosen.build(value) for value in (low, high)]
    return min(ends, key=lambda recipe: abs(density_on(recipe, calls) - density))


def _never() -> torch.Tensor:
    raise RuntimeError("A recorded call would run dense: its step lies in the dense phase.")


def density_on(recipe: Recipe, calls: Sequence[AttentionCall]) -> float:
    """Mean density of the recipe's plans on recorded calls; grid rules look at the first call alone."""
    calls = calls[:1] if recipe.select.is_static else calls
    engine = Engine(recipe, [str(n) for n in range(1 + max(call.layer for call in calls))], "auto", 0)
    for call in calls:
        assert isinstance(call.layout, TokenLayout)
        with torch.no_grad():
            inputs = AttentionInputs(call.q, call.k, call.v, scale=call.scale)
            engine.attend(AttentionCall.of(call.layer, inputs, call.layout, call.step, engine.run), _never)
    sparse = sum(record.sparse_calls for record in engine.records)
    return float(sum(record.density_sum for record in engine.records)) / max(sparse, 1)
