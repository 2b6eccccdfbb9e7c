"""Variants in turns, and what a ratio of their times is worth."""

from __future__ import annotations

import pytest

from dit_accel.quality.bootstrap import FEWEST_CLIPS
from dit_accel.quality.turns import Timing, in_turns, speed_up, spelled


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
    assert (found.low, found.high, found.count, found.kind) == (10 / 6, 12 / 5, 3, "range")
    assert spelled(found) == "2.00x (1.67x to 2.40x)"


def test_one_run_has_no_spread() -> None:
    assert spelled(speed_up([[10.0]], [[9.0]])) == "1.11x"


@pytest.mark.parametrize("dense", [[10.0, 10.5], [10.5, 10.0], [10.3, 10.3], [9.0, 12.0]])
def test_dense_against_dense_holds_one(dense: list[float]) -> None:
    """Two runs of one thing that differ by noise, also where each turn's second run was the faster."""
    for other in ([10.2, 10.4], [10.0, 10.5], [10.6, 9.9]):
        found = speed_up([dense], [other])
        assert found.low <= 1 <= found.high
        assert found.low <= found.median <= found.high


def test_many_clips_are_paired() -> None:
    """A machine that gets slower widens the times, not the ratios of clips measured one after the other."""
    dense = [[10.0 + n] for n in range(FEWEST_CLIPS)]
    fast = [[(10.0 + n) / 2] for n in range(FEWEST_CLIPS)]
    found = speed_up(dense, fast)
    assert (found.low, found.median, found.high, found.kind) == (2, 2, 2, "95%")
    few = speed_up(dense[:-1], fast[:-1])
    assert few.low < 2 < few.high
    assert few.kind == "range"


def test_clips_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        speed_up([[1.0], [1.0]], [[1.0]])


def test_timing_as_data() -> None:
    data = Timing((2.0, 1.0, 4.0), 2**30).to_dict()
    assert (data["median_s"], data["min_s"], data["max_s"], data["spread"]) == (2, 1, 4, 1.5)
    assert data["seconds"] == [2, 1, 4]
    assert data["peak_memory_gib"] == 1
    assert Timing((1.0,)).to_dict()["peak_memory_gib"] is None
