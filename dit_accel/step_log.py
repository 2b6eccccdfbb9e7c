"""What a transformer's calls did, step by step; kept only while somebody asks for it."""

from __future__ import annotations

import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from .layout import StepContext
from .records import Tally
from .run import Run
from .timing import Stopwatch

# Some tens of long runs; a server that records goes on for ever.
KEPT_STEPS = 4096


class Placed(Protocol):
    """What belongs to a step of a run: a call or a forward."""

    @property
    def run(self) -> Run: ...

    @property
    def step(self) -> StepContext: ...


@dataclass(eq=False)
class StepRecord:
    """One denoising step of a run, all its guidance branches together, or one forward where no step is known.

    Attributes:
        run: number of the run among those that were recorded.
        step: where it is in the run; of its first forward.
        forwards, skipped: forwards that ended, and those of them in which a reuse answered for some blocks.
        sparse_calls: counted.
        dense_calls: by reason.
        plans_made, plans_reused: plans that were made, and calls that took one made before.
        densities: of the sparse calls.
        forward_time, attention_time: of whole forwards, and of attention and planning in them; None where nobody asked.
    """

    run: int
    step: StepContext
    forwards: int = 0
    skipped: int = 0
    sparse_calls: int = 0
    dense_calls: Counter[str] = field(default_factory=Counter)
    plans_made: int = 0
    plans_reused: int = 0
    densities: Tally = field(default_factory=lambda: Tally(torch.sum))
    forward_time: Stopwatch | None = None
    attention_time: Stopwatch | None = None


Begun = float | torch.cuda.Event | None
"""When a region began; None where times are not recorded."""


class StepLog:
    """Records of the latest :data:`KEPT_STEPS` steps, in the order in which they began. Threads may share it.

    Args:
        with_seconds: also measure forwards and attention; on a GPU by events, which wait for nothing.
    """

    def __init__(self, with_seconds: bool = False) -> None:
        self.with_seconds = with_seconds
        self._records: OrderedDict[Hashable, StepRecord] = OrderedDict()
        self._runs: weakref.WeakKeyDictionary[Run, int] = weakref.WeakKeyDictionary()
        self._count = 0
        self._lock = threading.Lock()

    def records(self) -> list[StepRecord]:
        """In the order in which their steps began."""
        with self._lock:
            return list(self._records.values())

    def clear(self) -> None:
        """Forget all steps; runs are counted from nothing."""
        with self._lock:
            self._records.clear()
            self._runs.clear()
            self._count = 0

    def start(self, device: torch.device) -> Begun:
        """Begin a forward or a call of attention."""
        return Stopwatch().start(device) if self.with_seconds else None

    def end_forward(self, at: Placed, skipped: bool, begun: Begun, device: torch.device) -> None:
        """A forward ended, and not by an exception."""
        with self._lock:
            record = self._of(at)
            record.forwards += 1
            record.skipped += skipped
            if begun is not None and record.forward_time is not None:
                record.forward_time.stop(begun, device)

    def end_attention(self, at: Placed, begun: Begun, device: torch.device) -> None:
        """A call of attention ended."""
        with self._lock:
            watch = self._of(at).attention_time
            if begun is not None and watch is not None:
                watch.stop(begun, device)

    def add_plans(self, at: Placed, made: int) -> None:
        """A call has its plan, and so many were made for it."""
        with self._lock:
            record = self._of(at)
            record.plans_made += made
            record.plans_reused += not made

    def add_sparse(self, at: Placed, density: torch.Tensor) -> None:
        """A call ran sparse, at a density that is a 0-d tensor."""
        with self._lock:
            record = self._of(at)
            record.sparse_calls += 1
            record.densities.add(density)

    def add_dense(self, at: Placed, reason: str) -> None:
        """A call was not sparse."""
        with self._lock:
            self._of(at).dense_calls[reason] += 1

    def _of(self, at: Placed) -> StepRecord:
        if at.run not in self._runs:
            self._count += 1
            self._runs[at.run] = self._count
        run, step = self._runs[at.run], at.step
        key = (run, step.index) if step.index is not None else (run, None, step.forward_id)
        record = self._records.get(key)
        if record is None:
            watches = (Stopwatch(), Stopwatch()) if self.with_seconds else (None, None)
            record = StepRecord(run, step, forward_time=watches[0], attention_time=watches[1])
            self._records[key] = record
            while len(self._records) > KEPT_STEPS:
                self._records.popitem(last=False)
        return record
