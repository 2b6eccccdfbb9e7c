"""The graphs that runs keep, in each thread, and when they go."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...layout import StepContext
from ...run import Run
from .captured import Captured, Ran
from .recorder import Recorder
from .static import Slots

RecorderOf = Callable[[torch.device], Recorder]
Place = tuple[torch.device, int]
"""A device and its stream."""


@dataclass(eq=False)
class OfBranch:
    """What a guidance branch of a run keeps, by block.

    Attributes:
        latest: the step in which it ran last.
    """

    latest: int
    captured: dict[int, Captured] = field(default_factory=dict)
    ran: dict[int, Ran] = field(default_factory=dict)


@dataclass(eq=False)
class OfRun:
    """What a run keeps on one stream of one device."""

    recorder: Recorder
    slots: Slots
    branches: dict[Any, OfBranch] = field(default_factory=dict)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.runs: weakref.WeakKeyDictionary[Run, dict[Place, OfRun]] = weakref.WeakKeyDictionary()
        self.recorders: dict[Place, Recorder] = {}


class KeptGraphs:
    """What one transformer's runs keep, in all threads.

    Args:
        recorder_of: captures on a device, for its current stream.
    """

    def __init__(self, recorder_of: RecorderOf) -> None:
        self._recorder_of = recorder_of
        self._thread = _Thread()

    def of_run(self, run: Run, device: torch.device) -> OfRun:
        """What a run keeps on the current stream of a device."""
        place = device, _stream_of(device)
        runs = self._thread.runs.setdefault(run, {})
        found = runs.get(place)
        if found is None:
            found = runs[place] = OfRun(self._recorder(place), Slots())
        return found

    def end_step(self, run: Run, step: StepContext) -> None:
        """A forward of a branch has ended: what no later one replays goes, since what comes next wants the memory."""
        assert step.index is not None
        for of_run in self._thread.runs.get(run, {}).values():
            if step.index + 1 == step.num_steps:
                of_run.branches.pop(step.branch, None)
            elif step.branch in of_run.branches:
                of_run.branches[step.branch].latest = step.index
        self.drop_before(step.index - 1, run)  # guidance may have ended

    def drop_before(self, step: int, run: Run | None = None) -> None:
        """Drop the branches of a run, or of all of this thread's, that ran last before a step."""
        for one, runs in list(self._thread.runs.items()):
            if run is not None and one is not run:
                continue
            for of_run in runs.values():
                of_run.branches = {name: kept for name, kept in of_run.branches.items() if kept.latest >= step}
            if not any(of_run.branches for of_run in runs.values()):
                self._thread.runs.pop(one)
                recorders = [of_run.recorder for of_run in runs.values()]
                runs.clear()
                for recorder in recorders:
                    recorder.release()

    def clear(self) -> None:
        """Drop all, in every thread."""
        self._thread = _Thread()

    def _recorder(self, place: Place) -> Recorder:
        """The one of this thread for a stream: graphs of two streams may run at once, and must share nothing."""
        recorders = self._thread.recorders
        if place not in recorders:
            used = {one for runs in self._thread.runs.values() for one in runs}
            for idle in recorders.keys() - used:  # whose memory would wait for graphs that nobody captures any more
                del recorders[idle]
            recorders[place] = self._recorder_of(place[0])
        return recorders[place]


def _stream_of(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
