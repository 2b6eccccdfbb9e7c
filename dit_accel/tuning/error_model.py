"""What a combination loses, from runs of its parts alone.

On the embedded model, 30 steps, the squared error of a run that skips steps and is sparse is about the sum of that of
each alone. So errors are measured apart, interpolated in their logarithms, and added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .candidates import Choice
from .target import SMALLEST


@dataclass(frozen=True, eq=False)
class Curve:
    """Errors that rise along a coordinate, a straight line in logarithms between what was measured.

    Below the first measurement the error falls as the coordinate does, beyond the last it goes on as between the last
    two, at least in proportion.

    Attributes:
        at: coordinates above 0, rising, ``[K]``.
        errors: ``[K, prompts]``.
    """

    at: np.ndarray
    errors: np.ndarray

    @classmethod
    def through(cls, points: Mapping[float, Sequence[float]]) -> Curve:
        """Through measurements: noise that would make the error fall is levelled."""
        at = np.asarray(sorted(points), dtype=np.float64)
        errors = np.maximum(np.asarray([points[one] for one in sorted(points)], dtype=np.float64), SMALLEST)
        return cls(np.maximum(at, SMALLEST), np.maximum.accumulate(errors, axis=0))

    def __call__(self, coordinate: float) -> np.ndarray:
        """Errors ``[prompts]``."""
        x, logs = np.log(self.at), np.log(self.errors)
        here = np.log(max(coordinate, SMALLEST))
        if here <= x[0] or len(x) == 1:
            return np.exp(logs[0] + (here - x[0]))
        if here > x[-1]:
            slope = np.maximum((logs[-1] - logs[-2]) / max(x[-1] - x[-2], SMALLEST), 1.0)
            return np.exp(logs[-1] + slope * (here - x[-1]))
        return np.exp([np.interp(here, x, column) for column in logs.T])


@dataclass(frozen=True, eq=False)
class Held:
    """A quantity's logarithm between coordinates that may fall as well as rise, and stays beyond the ends."""

    at: np.ndarray
    errors: np.ndarray

    @classmethod
    def through(cls, points: Mapping[float, Sequence[float]]) -> Held:
        """Through measurements: more density or more dense steps never lose more, so that a rise is levelled."""
        at = np.asarray(sorted(points), dtype=np.float64)
        errors = np.maximum(np.asarray([points[one] for one in sorted(points)], dtype=np.float64), SMALLEST)
        return cls(at, np.minimum.accumulate(errors, axis=0))

    def __call__(self, coordinate: float) -> np.ndarray:
        """Errors ``[prompts]``."""
        return np.exp([np.interp(coordinate, self.at, column) for column in np.log(self.errors).T])


@dataclass(frozen=True, eq=False)
class ErrorModel:
    """Errors of lists over their scores, and of sparsity over density and dense steps.

    Attributes:
        lists: over the score of a list; None where none was measured.
        densities: at ``usual``'s dense steps.
        phases: at ``usual``'s density, over dense steps.
        usual: the choice that both have.
    """

    lists: Curve | None
    densities: Held
    phases: Held
    usual: Choice

    @classmethod
    def fit(
        cls, measured: Mapping[Choice, Sequence[float]], scores: Mapping[Choice, float], usual: Choice
    ) -> ErrorModel:
        """From errors ``[prompts]`` of choices that skip steps or are sparse, not both.

        Args:
            measured: errors that add up, see :func:`~dit_accel.tuning.target.error_of`.
            scores: of the lists.
            usual: sparse, with the dense steps of all measured densities and the density of all measured phases.
        """
        lists = {scores[one]: errors for one, errors in measured.items() if one.density is None and one.computed}
        sparse = [(one.density, one.dense_steps, e) for one, e in measured.items() if one.density and not one.computed]
        return cls(
            Curve.through(lists) if lists else None,
            Held.through({density: errors for density, steps, errors in sparse if steps == usual.dense_steps}),
            Held.through({steps: errors for density, steps, errors in sparse if density == usual.density}),
            usual,
        )

    def errors(self, choice: Choice, score: float) -> np.ndarray:
        """Errors ``[prompts]`` of a choice whose list has this score."""
        total = np.zeros(self.densities.errors.shape[1])
        if choice.computed is not None and self.lists is not None:
            total = total + self.lists(score)
        if choice.density is not None:
            # The dense phase changes all densities' errors by one factor.
            factor = self.phases(choice.dense_steps) / self.phases(self.usual.dense_steps)
            total = total + self.densities(choice.density) * factor
        return total
