"""Times that can be compared: variants that run in turns, and what the ratio of their times is worth."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

from .bootstrap import FEWEST_CLIPS, Interval, bootstrap_median, range_of

Result = TypeVar("Result")


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


def speed_up(dense: Sequence[Sequence[float]], fast: Sequence[Sequence[float]]) -> Interval:
    """How many times as fast one variant is as dense, from the runs of both.

    Its ``median`` is that of the clips' ratios, each of the medians of a clip's runs. From
    :data:`~dit_accel.quality.bootstrap.FEWEST_CLIPS` clips on the interval is a bootstrap of that median. Of fewer it
    is the range that the times allow, from the fastest dense run over the slowest accelerated one to the slowest over
    the fastest: it holds 1 unless all runs of one side are faster than all of the other. ``count`` is the number of
    clips, or of runs of each side; one run has no spread.

    Args:
        dense, fast: seconds of the runs of each clip, the same clips in the same order.
    """
    ratios = [statistics.median(d) / statistics.median(f) for d, f in zip(dense, fast, strict=True)]
    if len(ratios) >= FEWEST_CLIPS:
        return bootstrap_median(ratios)
    slow_runs, fast_runs = (list(chain.from_iterable(runs)) for runs in (dense, fast))
    found = range_of(ratios)
    low, high = min(slow_runs) / max(fast_runs), max(slow_runs) / min(fast_runs)
    return Interval(found.mean, found.median, low, high, min(len(slow_runs), len(fast_runs)), found.kind)


def spelled(found: Interval) -> str:
    """A speed-up as text: ``1.30x (1.21x to 1.38x)``, without the spread that a single run does not have."""
    spread = f" ({found.low:.2f}x to {found.high:.2f}x)" if found.count > 1 else ""
    return f"{found.median:.2f}x{spread}"
