"""Which combination to run next, and which of those that were run is the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .candidates import Choice
from .target import Target, error_of, fidelity_of

WORTH = 1.02
"""A further run is worth its time where it promises so many times the speed, or so much less error."""


@dataclass(frozen=True, eq=False)
class Point:
    """One combination, as predicted or as measured.

    Attributes:
        choice: what it is.
        errors: of each prompt, as they add up.
        seconds: of a run, the mean over prompts.
    """

    choice: Choice
    errors: np.ndarray
    seconds: float


@dataclass(frozen=True, eq=False)
class Ladder:
    """Predictions, and the runs that put them right.

    Attributes:
        target: what is asked for.
        dense_seconds: of a dense run, the mean over prompts.
        predicted: every combination.
        measured: those that were run.
    """

    target: Target
    dense_seconds: float
    predicted: Sequence[Point]
    measured: Mapping[Choice, Point]

    def fidelity(self, point: Point) -> float:
        return fidelity_of(self.target.metric.name, point.errors)

    def speedup(self, point: Point) -> float:
        return self.dense_seconds / point.seconds

    def is_met(self, point: Point) -> bool:
        return self.target.is_met(self.fidelity(point), self.speedup(point))

    def expected(self) -> list[Point]:
        """Predictions put right by what was measured of combinations: their mean ratio to their predictions."""
        predicted = {point.choice: point for point in self.predicted}
        both = [
            (predicted[choice], point)
            for choice, point in self.measured.items()
            if choice in predicted and choice.density is not None and choice.computed is not None
        ]
        if not both:
            return list(self.predicted)
        floor = error_of("lpips", 0.0)
        errors = np.exp(np.mean([np.log(np.maximum(m.errors, floor) / np.maximum(p.errors, floor)) for p, m in both]))
        seconds = float(np.exp(np.mean([np.log(m.seconds / p.seconds) for p, m in both])))
        return [
            replace(point, errors=point.errors * errors, seconds=point.seconds * seconds)
            if point.choice.density is not None and point.choice.computed is not None
            else point
            for point in self.predicted
        ]

    def best(self) -> Point | None:
        """The best that was run and meets the target; None where none does."""
        met = [point for point in self.measured.values() if self.is_met(point)]
        return min(met, key=self._rank, default=None)

    def nearest(self) -> Point:
        """What was run and comes nearest to the target."""
        return min(self.measured.values(), key=self._distance)

    def next(self) -> Choice | None:
        """What to run next; None where no run promises anything."""
        left = [point for point in self.expected() if point.choice not in self.measured]
        best = self.best()
        met = [point for point in left if self.is_met(point) and (best is None or self._is_worth(point, best))]
        if met:
            return min(met, key=self._rank).choice
        if best is not None or not left:
            return None
        nearest = min(left, key=self._distance)
        # Nothing is expected to meet it: one run shows whether that is so.
        return nearest.choice if self._distance(nearest) < self._distance(self.nearest()) else None

    def _rank(self, point: Point) -> float:
        return float(np.mean(np.log(np.maximum(point.errors, 1e-300)))) if self.target.is_speed else point.seconds

    def _is_worth(self, point: Point, best: Point) -> bool:
        margin = float(np.log(WORTH)) if self.target.is_speed else point.seconds * (WORTH - 1.0)
        return self._rank(point) + margin < self._rank(best)

    def _distance(self, point: Point) -> float:
        """How far a point misses the target; one that is slower than dense is no answer, and comes last."""
        if self.target.is_speed:
            return -self.speedup(point)
        fidelity = self.fidelity(point)
        away = -fidelity if self.target.metric.higher_is_better else fidelity
        return away + (1e6 if self.speedup(point) <= 1.0 else 0.0)


def front(points: Sequence[Point]) -> list[Point]:
    """From fast to slow, each with less error than all faster ones."""
    found: list[Point] = []
    for point in sorted(points, key=lambda one: (one.seconds, float(np.mean(np.log(one.errors + 1e-300))))):
        if not found or np.mean(np.log(point.errors + 1e-300)) < np.mean(np.log(found[-1].errors + 1e-300)):
            found.append(point)
    return found
