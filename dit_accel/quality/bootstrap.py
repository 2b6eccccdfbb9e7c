"""How far a mean or median over clips can be trusted: bootstrap intervals, and of few clips the range."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .measurement import number_to_json

FEWEST_CLIPS = 10
"""Fewer clips have a range, no confidence interval.

Of 2 or 3 clips the ends of a 95% percentile bootstrap are the lowest and the highest clip: one clip alone makes up 1/4
or 1/27 of the resamples, more than the 2.5% beyond an end. Of n normal values it covers the mean as often as Student's
t of n - 1 degrees of freedom stays below 1.96 sqrt((n - 1) / n): 81% of the time with 4 clips, 89% with 8, 90% with 10,
92% with 16. Ten clips are where the name is wrong by at most five in a hundred.
"""

RANGE = "range"


@dataclass(frozen=True)
class Interval:
    """A mean and a median over clips or runs, and how far they scatter.

    Attributes:
        mean, median: of the values.
        low, high: ends of the interval.
        count: how many values.
        kind: what the interval is: ``"range"``, from the lowest to the highest value, a confidence such as ``"95%"``,
            or of a speed-up of few clips the ``"noise of the runs"``. Only a confidence says how sure the mean is.
    """

    mean: float
    median: float
    low: float
    high: float
    count: int
    kind: str

    @property
    def is_range(self) -> bool:
        """Whether the ends are the lowest and the highest value."""
        return self.kind == RANGE

    def to_json(self) -> dict[str, float | str | int]:
        """JSON-ready; infinities as text."""
        numbers = {name: number_to_json(getattr(self, name)) for name in ("mean", "median", "low", "high")}
        return {**numbers, "count": self.count, "kind": self.kind}


def range_of(values: Sequence[float]) -> Interval:
    """Lowest to highest of any number of values.

    Raises:
        ValueError: no values, or NaN among them.
    """
    data = _checked(values)
    mean, median = float(data.mean()), float(np.median(data))
    return Interval(mean, median, float(data.min()), float(data.max()), int(data.size), RANGE)


def bootstrap_mean(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean over clips with a percentile bootstrap interval (Efron 1979), or the range of fewer than FEWEST_CLIPS.

    Clips are the unit of resampling, because frames of one clip are not independent. Infinite values (PSNR of
    identical clips) are allowed; interval ends are then infinite where that many resamples are.

    Args:
        values: one number per clip, at least one. With one clip the interval has no width.
        confidence: share of resampled means inside the interval, in (0, 1).
        resamples: how many resamples.
        seed: of the resampling, so that a report can be made again.

    Raises:
        ValueError: no values, NaN among them, or an argument out of range.
    """
    return _bootstrap(values, np.mean, confidence, resamples, seed)


def bootstrap_median(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """The same for the median, which one slow run does not move: see :func:`bootstrap_mean`."""
    return _bootstrap(values, np.median, confidence, resamples, seed)


def _bootstrap(
    values: Sequence[float], statistic: Callable[..., Any], confidence: float, resamples: int, seed: int
) -> Interval:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}.")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}.")
    found = range_of(values)
    if found.count < FEWEST_CLIPS:
        return found
    data = _checked(values)
    picks = np.random.default_rng(seed).integers(0, data.size, size=(resamples, data.size))
    resampled = statistic(data[picks], axis=1)
    tail = (1 - confidence) / 2
    # Order statistics instead of interpolation: defined for infinities, and on the wide side.
    low = np.quantile(resampled, tail, method="lower")
    high = np.quantile(resampled, 1 - tail, method="higher")
    return Interval(found.mean, found.median, float(low), float(high), found.count, f"{confidence:.0%}")


def _checked(values: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or data.size == 0 or np.isnan(data).any():
        raise ValueError(f"values must be a non-empty sequence of numbers without NaN, got {list(values)}.")
    return data
