"""Times that can be compared: variants that run in turns, and what the ratio of their times is worth."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, TypeVar

from .bootstrap import FEWEST_CLIPS, Interval, bootstrap_median, range_of

Result = TypeVar("Result")

WARM_UP_STEPS = 2
"""Denoising steps of a side's warm-up: the first may be in a recipe's dense phase, and what a sparse one compiles must
not be timed."""

LONG_WARM_UP_STEPS = 10
"""The same where steps are skipped: enough that there are dense ones, that they end, and that some are skipped."""

NOISE = "noise of the runs"
"""Kind of the interval of a speed-up from few clips."""


def steps_to_warm_up(device: str, few_steps: int) -> int:
    """Denoising steps of a warm-up on a kind of device.

    Args:
        few_steps: the longest run without a dense step (``schedule.few_steps``). Where kernels are compiled a warm-up
            is longer, since a dense step may run one of its own.
    """
    return WARM_UP_STEPS if device == "cpu" or not few_steps else few_steps + 1


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant, in order of measurement, and its peak memory in bytes, None where it is not known."""

    seconds: tuple[float, ...]
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median."""
        return (max(self.seconds) - min(self.seconds)) / self.median

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        peak = None if self.peak_bytes is None else round(self.peak_bytes / 2**30, 3)
        return {
            "median_s": self.median,
            "min_s": min(self.seconds),
            "max_s": max(self.seconds),
            "spread": self.spread,
            "seconds": list(self.seconds),
            "peak_memory_gib": peak,
        }


def in_turns(
    variants: Mapping[str, Callable[[], Result]], repeats: int, first: int = 0
) -> Iterator[tuple[str, Result]]:
    """Run each variant once a turn: in the order given, and in the next turn backwards.

    A machine that slows down slows all variants alike, and none always runs in the wake of the same other.

    Args:
        variants: what to run, by name.
        repeats: number of turns.
        first: number of the first turn; odd ones run backwards.

    Raises:
        ValueError: less than one turn.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")
    names = list(variants)
    for turn in range(first, first + repeats):
        for name in names if turn % 2 == 0 else reversed(names):
            yield name, variants[name]()


def measured_in_turns(
    sides: Mapping[str, Callable[[bool], Result]], repeats: int, warm_up: bool
) -> dict[str, list[Result]]:
    """Results of every side by name: first each side is warmed up, then they take turns.

    Args:
        sides: told whether it is the warm-up, which is short and whose result is thrown away.
        repeats: timed runs of each.
    """
    if warm_up:
        for run in sides.values():
            run(True)
    found: dict[str, list[Result]] = {name: [] for name in sides}
    for name, result in in_turns({name: partial(run, False) for name, run in sides.items()}, repeats):
        found[name].append(result)
    return found


def speed_up(dense: Sequence[Sequence[float]], fast: Sequence[Sequence[float]]) -> Interval:
    """How many times as fast one variant is as dense, from the runs of both.

    Its ``median`` is that of the clips' ratios, each of the medians of a clip's runs. From
    :data:`~dit_accel.quality.bootstrap.FEWEST_CLIPS` clips on the interval is a bootstrap of that median. Of fewer it
    goes up and down from the median by the noise of the runs: the ratio of the slowest to the fastest run, of the side
    that varies more, since a quiet side of few runs may be quiet by chance. ``count`` is the number of clips, or of
    runs of each side; one run has no spread.

    Args:
        dense, fast: seconds of the runs of each clip, the same clips in the same order.
    """
    ratios = [statistics.median(d) / statistics.median(f) for d, f in zip(dense, fast, strict=True)]
    if len(ratios) >= FEWEST_CLIPS:
        return bootstrap_median(ratios)
    sides = [list(chain.from_iterable(runs)) for runs in (dense, fast)]
    noise = max(max(runs) / min(runs) for runs in sides)
    found = range_of(ratios)
    count = min(len(runs) for runs in sides)
    return replace(found, low=found.median / noise, high=found.median * noise, count=count, kind=NOISE)


def spelled(found: Interval) -> str:
    """A speed-up as text: ``1.30x (1.21x to 1.38x)``, without the spread that a single run does not have."""
    spread = f" ({found.low:.2f}x to {found.high:.2f}x)" if found.count > 1 else ""
    return f"{found.median:.2f}x{spread}"
