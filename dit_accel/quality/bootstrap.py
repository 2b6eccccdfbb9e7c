"""Confidence intervals over clips by the percentile bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its confidence interval, over ``count`` clips."""

    mean: float
    low: float
    high: float
    count: int


def bootstrap_mean(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean over clips with a percentile bootstrap interval (Efron 1979).

    Clips are the unit of resampling, because frames of one clip are not independent. Infinite values (PSNR of
    identical clips) are allowed; interval ends are then infinite where that many resamples are.

    Args:
        values: one number per clip, at least one. With one clip the interval has no width.
        confidence: share of resampled means inside the interval, in (0, 1).
        resamples: how many resamples.
        seed: of the resampling, so that a report can be made again.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or data.size == 0 or np.isnan(data).any():
        raise ValueError(f"values must be a non-empty sequence of numbers without NaN, got {list(values)}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}.")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}.")
    picks = np.random.default_rng(seed).integers(0, data.size, size=(resamples, data.size))
    means = data[picks].mean(axis=1)
    tail = (1 - confidence) / 2
    # Order statistics instead of interpolation: defined for infinities, and on the wide side.
    low = np.quantile(means, tail, method="lower")
    high = np.quantile(means, 1 - tail, method="higher")
    return Interval(mean=float(data.mean()), low=float(low), high=float(high), count=int(data.size))
