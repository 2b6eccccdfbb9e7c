"""How long a whole run takes, from the steps that were measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

import numpy as np

from ..layout import StepContext
from ..recipe import Recipe
from ..stages.reuse.listed import Listed

DENSE, SEARCH, SPARSE, SKIPPED = "dense", "search", "sparse", "skipped"


def kinds_of(recipe: Recipe, num_steps: int) -> tuple[str, ...]:
    """What each step of a run does: dense or sparse attention, a search for a plan that is kept, or none of it.

    Of a reuse only a list is known before the run; any other counts as if every step were computed.
    """
    select, schedule, reuse = recipe.select, recipe.schedule, recipe.reuse
    kinds: list[str] = []
    made: StepContext | None = None
    for index in range(num_steps):
        computed = sum(kind != SKIPPED for kind in kinds)
        step = StepContext(index, num_steps, computed=None if reuse.is_none else computed)
        plans = not (select.is_dense or select.is_static) and schedule.plans_now(step, made, 1)
        if index and isinstance(reuse, Listed) and not plans and not reuse.computes(step):
            kinds.append(SKIPPED)
        elif plans:
            made = step
            kinds.append(SEARCH)
        else:
            dense = select.is_dense or schedule.dense_reason(step, 0, 1) is not None
            kinds.append(DENSE if dense else SPARSE)
    return tuple(kinds)


@dataclass(frozen=True)
class RunSeconds:
    """Seconds of one run.

    Attributes:
        steps: of each denoising step.
        rest: before the first and behind the last: text encoders and decoding.
    """

    steps: tuple[float, ...]
    rest: float

    @property
    def total(self) -> float:
        return sum(self.steps) + self.rest


@dataclass(frozen=True)
class TimeModel:
    """Seconds of a run's parts: medians over all measured runs.

    Attributes:
        rest, dense, search, skipped: of the rest of a run, and of a step of each kind.
        sparse: of a sparse step without any block, and more of it at density 1.
    """

    rest: float
    dense: float
    search: float
    skipped: float
    sparse: tuple[float, float]

    @classmethod
    def fit(cls, runs: Iterable[tuple[Recipe, RunSeconds]]) -> TimeModel:
        """From runs of whole recipes, dense ones among them.

        A kind of step that no run had takes as long as a dense one.
        """
        by_kind: dict[str, list[float]] = {}
        by_density: dict[float, list[float]] = {}
        rests = []
        for recipe, seconds in runs:
            rests.append(seconds.rest)
            for kind, one in zip(kinds_of(recipe, len(seconds.steps)), seconds.steps, strict=True):
                by_kind.setdefault(kind, []).append(one)
                if kind == SPARSE:
                    by_density.setdefault(recipe.select.density or 0.0, []).append(one)
        dense = median(by_kind[DENSE])
        return cls(
            rest=median(rests),
            dense=dense,
            search=median(by_kind.get(SEARCH, [dense])),
            skipped=median(by_kind.get(SKIPPED, [dense])),
            sparse=_line({density: median(some) for density, some in by_density.items()}, dense),
        )

    def seconds(self, recipe: Recipe, num_steps: int) -> float:
        """Of a whole run."""
        base, slope = self.sparse
        of_kind = {
            DENSE: self.dense,
            SEARCH: self.search,
            SKIPPED: self.skipped,
            SPARSE: base + slope * (recipe.select.density or 0.0),
        }
        return self.rest + sum(of_kind[kind] for kind in kinds_of(recipe, num_steps))


def _line(points: dict[float, float], otherwise: float) -> tuple[float, float]:
    """Least squares; blocks cost time, so that a line which falls is noise."""
    if not points:
        return otherwise, 0.0
    if len(points) == 1:
        return next(iter(points.values())), 0.0
    slope, base = np.polyfit(list(points), list(points.values()), 1)
    return (float(base), float(slope)) if slope > 0 else (median(points.values()), 0.0)
