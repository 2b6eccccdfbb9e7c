"""Bootstrap intervals: coverage, seeding, infinities."""

import math

import numpy as np
import pytest

from dit_accel.quality import bootstrap_mean


def test_matches_the_normal_interval() -> None:
    values = np.random.default_rng(3).normal(5, 2, size=200)
    interval = bootstrap_mean(values.tolist())
    half = 1.96 * values.std() / math.sqrt(values.size)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.count == 200
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_coverage() -> None:
    """With 16 clips a 95% percentile interval covers the true mean a little less than 95% of the time."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        interval = bootstrap_mean(rng.normal(0, 1, size=16).tolist(), resamples=500)
        hits += interval.low <= 0 <= interval.high
    # Binomial scatter of 300 draws at 0.92 is 0.016: three of them either side.
    assert 0.87 <= hits / 300 <= 0.97


def test_seeded() -> None:
    values = [1.0, 4.0, 2.0, 8.0]
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, resamples=50, seed=1) != bootstrap_mean(values, resamples=50, seed=2)


def test_one_clip_has_no_width() -> None:
    interval = bootstrap_mean([3.5])
    assert (interval.low, interval.mean, interval.high) == (3.5, 3.5, 3.5)


def test_infinite_values() -> None:
    assert bootstrap_mean([math.inf, math.inf]).low == math.inf
    mixed = bootstrap_mean([30.0, 31.0, 32.0, math.inf])
    assert mixed.mean == math.inf
    assert 30 <= mixed.low <= 32
    assert mixed.high == math.inf


@pytest.mark.parametrize("values", [[], [1.0, math.nan]])
def test_bad_values(values: list[float]) -> None:
    with pytest.raises(ValueError, match="non-empty sequence of numbers without NaN"):
        bootstrap_mean(values)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"confidence must lie between 0 and 1, got 95"):
        bootstrap_mean([1.0], confidence=95)
    with pytest.raises(ValueError, match="resamples must be at least 1, got 0"):
        bootstrap_mean([1.0], resamples=0)
