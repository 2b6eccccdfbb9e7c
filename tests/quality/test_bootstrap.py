"""Bootstrap intervals: coverage, seeding, infinities, and too few clips for any."""

import math

import numpy as np
import pytest

from dit_accel.quality import bootstrap_mean
from dit_accel.quality.bootstrap import FEWEST_CLIPS, bootstrap_median, range_of


def test_matches_the_normal_interval() -> None:
    values = np.random.default_rng(3).normal(5, 2, size=200)
    interval = bootstrap_mean(values.tolist())
    half = 1.96 * values.std() / math.sqrt(values.size)
    assert interval.mean == pytest.approx(values.mean())
    assert (interval.count, interval.kind) == (200, "95%")
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
    values = [1.0, 4.0, 2.0, 8.0, 3.0, 9.0, 0.5, 7.0, 6.0, 5.0]
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, resamples=50, seed=1) != bootstrap_mean(values, resamples=50, seed=2)


def test_one_clip_has_no_width() -> None:
    interval = bootstrap_mean([3.5])
    assert (interval.low, interval.mean, interval.high) == (3.5, 3.5, 3.5)


def test_infinite_values() -> None:
    assert bootstrap_mean([math.inf, math.inf]).low == math.inf
    mixed = bootstrap_mean([30.0, 31.0, 32.0, math.inf, *range(20, 30)])
    assert mixed.mean == math.inf
    assert 20 <= mixed.low <= 32
    assert mixed.high == math.inf
    assert mixed.to_json()["high"] == "inf"


@pytest.mark.parametrize("bootstrap", [bootstrap_mean, bootstrap_median])
@pytest.mark.parametrize("count", [1, 2, 3, 5, FEWEST_CLIPS - 1])
def test_few_clips_have_a_range_and_no_interval(bootstrap: object, count: int) -> None:
    values = [float(n) for n in range(count)]
    found = bootstrap(values)  # type: ignore[operator]
    assert (found.low, found.high, found.kind, found.is_range) == (0, count - 1, "range", True)
    assert found.to_json()["kind"] == "range"


@pytest.mark.parametrize("bootstrap", [bootstrap_mean, bootstrap_median])
def test_enough_clips_have_an_interval_inside_their_range(bootstrap: object) -> None:
    values = [float(n) for n in range(FEWEST_CLIPS)]
    found = bootstrap(values)  # type: ignore[operator]
    assert found.kind == "95%"
    assert 0 < found.low < found.median < found.high < FEWEST_CLIPS - 1
    assert bootstrap(values, confidence=0.9).kind == "90%"  # type: ignore[operator]


def test_where_the_name_95_begins() -> None:
    """At the fewest clips a 95% interval covers at least 89%; with two, were it made, it would be the range: 50%."""
    rng = np.random.default_rng(1)

    def covers(count: int, draws: int = 1500) -> float:
        found = [bootstrap_mean(rng.normal(0, 1, size=count).tolist(), resamples=400) for _ in range(draws)]
        return sum(interval.low <= 0 <= interval.high for interval in found) / draws

    # Binomial scatter of 1,500 draws is 0.008: three of them below the 0.904 of Student's t.
    assert covers(FEWEST_CLIPS) >= 0.88
    assert covers(2) < 0.6


def test_a_slow_run_moves_the_mean_and_not_the_median() -> None:
    values = [1.0] * 15 + [10.0]
    assert bootstrap_mean(values).high > 2
    assert (bootstrap_median(values).median, bootstrap_median(values).high) == (1, 1)


def test_range_of_many() -> None:
    found = range_of([3.0, *[2.0] * 20, 1.0])
    assert (found.low, found.median, found.high, found.count, found.kind) == (1, 2, 3, 22, "range")


@pytest.mark.parametrize("values", [[], [1.0, math.nan]])
def test_bad_values(values: list[float]) -> None:
    with pytest.raises(ValueError, match="non-empty sequence of numbers without NaN"):
        bootstrap_mean(values)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"confidence must lie between 0 and 1, got 95"):
        bootstrap_mean([1.0], confidence=95)
    with pytest.raises(ValueError, match="resamples must be at least 1, got 0"):
        bootstrap_mean([1.0], resamples=0)
