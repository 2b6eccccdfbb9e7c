"""Variants in turns, and what a ratio of their times is worth."""

from __future__ import annotations

import random

import pytest

from dit_accel import presets
from dit_accel.layout import StepContext
from dit_accel.quality.bootstrap import FEWEST_CLIPS
from dit_accel.quality.turns import Timing, in_turns, speed_up, spelled, steps_to_warm_up


def test_turns_alternate_in_order() -> None:
    variants = {name: lambda name=name: name.upper() for name in "abc"}
    runs = list(in_turns(variants, 3))
    assert [name for name, _ in runs] == list("abccbaabc")
    assert all(result == name.upper() for name, result in runs)
    assert [name for name, _ in in_turns(variants, 1, first=1)] == list("cba")
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        list(in_turns(variants, 0))


def test_runs_of_one_clip() -> None:
    found = speed_up([[10.0, 12.0, 11.0]], [[5.0, 5.5, 6.0]])
    assert found.median == 11 / 5.5
    # Both sides vary by 1.2.
    assert (found.low, found.high) == (pytest.approx(2 / 1.2), pytest.approx(2.4))
    assert (found.count, found.kind) == (3, "noise of the runs")
    assert spelled(found) == "2.00x (1.67x to 2.40x)"


def test_a_quiet_side_is_as_noisy_as_the_other() -> None:
    """Two accelerated runs that took the same time by chance, on a machine whose dense runs differ by a tenth."""
    found = speed_up([[1.50, 1.69]], [[1.44, 1.46]])
    assert found.low < 1 < found.median < found.high


def test_one_run_has_no_spread() -> None:
    assert spelled(speed_up([[10.0]], [[9.0]])) == "1.11x"


@pytest.mark.parametrize(("runs", "misses"), [(2, 0.26), (3, 0.1), (5, 0.02)])
def test_dense_against_dense_holds_one(runs: int, misses: float) -> None:
    """Runs of one thing that differ by noise alone: how often the interval fails to hold 1."""
    draw = random.Random(0)
    found = []
    for _ in range(1000):
        found.append(speed_up(*([[draw.lognormvariate(0, 0.05) for _ in range(runs)]] for _ in range(2))))
    assert all(one.low <= one.median <= one.high for one in found)
    assert sum(not one.low <= 1 <= one.high for one in found) / len(found) <= misses


def test_many_clips_are_paired() -> None:
    """A machine that gets slower widens the times, not the ratios of clips measured one after the other."""
    dense = [[10.0 + n] for n in range(FEWEST_CLIPS)]
    fast = [[(10.0 + n) / 2] for n in range(FEWEST_CLIPS)]
    found = speed_up(dense, fast)
    assert (found.low, found.median, found.high, found.kind) == (2, 2, 2, "95%")
    few = speed_up(dense[:-1], fast[:-1])
    assert few.low < 2 < few.high
    assert few.kind == "noise of the runs"


def test_clips_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        speed_up([[1.0], [1.0]], [[1.0]])


def test_timing_as_data() -> None:
    data = Timing((2.0, 1.0, 4.0), 2**30).to_dict()
    assert (data["median_s"], data["min_s"], data["max_s"], data["spread"]) == (2, 1, 4, 1.5)
    assert data["seconds"] == [2, 1, 4]
    assert data["peak_memory_gib"] == 1
    assert Timing((1.0,)).to_dict()["peak_memory_gib"] is None


def test_a_warm_up_has_a_dense_step_where_kernels_are_compiled():
    assert [steps_to_warm_up("cpu", 8), steps_to_warm_up("cuda", 0), steps_to_warm_up("cuda", 8)] == [2, 2, 9]
    recipe = presets.mass()
    assert recipe.schedule.dense_reason(StepContext(0, 9), 0, 1) == "dense phase"
    assert recipe.schedule.dense_reason(StepContext(0, recipe.schedule.few_steps), 0, 1) is None
