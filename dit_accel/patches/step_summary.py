"""What each recorded step of a run did, as data and as a line of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..step_log import StepLog
from ..timing import Stopwatch


@dataclass(frozen=True)
class StepSummary:
    """One denoising step of a run, all its guidance branches together.

    Attributes:
        transformer: which one, where the pipeline has several; else empty.
        run: number of the run among the recorded ones, from 1.
        step: its index in the run; None of a bare forward, which is a step by itself.
        of_steps: number of steps of the run.
        sigma: noise level; None where the scheduler has none.
        forwards: that ended; ``skipped_forwards`` of them took an earlier result for some blocks.
        sparse_calls: counts; ``density`` is their mean kept share of block pairs, None without any.
        dense_calls: count by reason, without those that compiled code passes by itself.
        plans_made, plans_reused: plans made, and calls that took one made before.
        seconds: of the forwards, from their first to their last operation. ``attention_seconds``: of attention and
            planning in them. None where times were not asked for.
    """

    transformer: str
    run: int
    step: int | None
    of_steps: int | None
    sigma: float | None
    forwards: int
    skipped_forwards: int
    sparse_calls: int
    dense_calls: dict[str, int]
    plans_made: int
    plans_reused: int
    density: float | None
    seconds: float | None = None
    attention_seconds: float | None = None

    @property
    def mean_density(self) -> float | None:
        """Mean kept share over all calls, dense ones counted as 1; None without any call, as where all was reused."""
        dense = sum(self.dense_calls.values())
        calls = self.sparse_calls + dense
        return None if not calls else ((self.density or 0.0) * self.sparse_calls + dense) / calls

    @property
    def kind(self) -> str:
        """What the step is to a run: "skipped", "planned", "reused" or "dense", by the first of these that it did."""
        if self.skipped_forwards:
            return "skipped"
        if self.plans_made:
            return "planned"
        return "reused" if self.sparse_calls else "dense"

    def __str__(self) -> str:
        place = "a forward" if self.step is None else f"step {self.step + 1} of {self.of_steps}"
        parts = [f"{self.transformer} {place}".strip(), self.kind]
        if self.density is not None:
            parts.append(f"{self.sparse_calls} sparse calls at density {self.density:.3f}")
        parts += [f"{count} dense ({reason})" for reason, count in self.dense_calls.items()]
        if self.plans_made:
            parts.append(f"{self.plans_made} plans")
        if self.seconds is not None:
            parts.append(f"{self.seconds:.3f} s")
        return ", ".join(parts)


def summarise_steps(log: StepLog | None, transformer: str) -> tuple[StepSummary, ...]:
    """The records of a transformer; waits for the device. Empty where none were kept."""
    if log is None:
        return ()
    return tuple(
        StepSummary(
            transformer=transformer,
            run=record.run,
            step=record.step.index,
            of_steps=record.step.num_steps,
            sigma=record.step.sigma,
            forwards=record.forwards,
            skipped_forwards=record.skipped,
            sparse_calls=record.sparse_calls,
            dense_calls=dict(record.dense_calls),
            plans_made=record.plans_made,
            plans_reused=record.plans_reused,
            density=record.densities.total() / record.sparse_calls if record.sparse_calls else None,
            seconds=_seconds(record.forward_time),
            attention_seconds=_seconds(record.attention_time),
        )
        for record in log.records()
    )


def line_of_steps(steps: Sequence[StepSummary]) -> str:
    """How many steps were of each kind."""
    counts = Counter(step.kind for step in steps)
    kinds = ", ".join(f"{counts[kind]} {kind}" for kind in ("dense", "planned", "reused", "skipped") if counts[kind])
    return f"steps: {len(steps)} recorded, {kinds}"


def _seconds(watch: Stopwatch | None) -> float | None:
    return None if watch is None else watch.seconds()
