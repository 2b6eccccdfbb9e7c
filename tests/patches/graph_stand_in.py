"""CUDA graphs without a GPU: a replay does again what was captured, in the forward of that time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

import dit_accel.call
import dit_accel.run
from dit_accel.patches.graphs import blocks, install
from dit_accel.patches.graphs.static import Slot, Slots
from dit_accel.patches.session import Session


@dataclass
class StandIn:
    """Counts of what was captured and replayed.

    Attributes:
        captured: blocks.
        released: how often memory could go.
        replayed: calls of blocks.
        fails: raised behind what the next capture launches.
        now: whether something is captured, or replayed, now.
    """

    captured: int = 0
    replayed: int = 0
    released: int = 0
    fails: Exception | None = None
    now: bool = False


class _Graph:
    def __init__(self, seen: StandIn, session: Session, launch: Callable[[], None]) -> None:
        self.seen, self.session, self.launch = seen, session, launch
        forward = session.forward
        assert forward is not None
        self.forward = replace(forward, calls=dict(forward.calls), used=dict(forward.used))

    def replay(self) -> None:
        self.seen.replayed += 1
        thread = self.session._thread
        outer, thread.forward = thread.forward, replace(self.forward, calls=dict(self.forward.calls))
        self.seen.now = True
        try:
            with self.session.engine.planner.of_graphs.instead({}):
                self.launch()
        finally:
            self.seen.now = False
            thread.forward = outer


class _Recorder:
    def __init__(self, seen: StandIn, session: Session) -> None:
        self.seen, self.session = seen, session

    def capture(self, launch: Callable[[], None]) -> _Graph:
        graph = _Graph(self.seen, self.session, launch)
        self.seen.now = True
        try:
            launch()
            if self.seen.fails is not None:
                raise self.seen.fails
        finally:
            self.seen.now = False
        self.seen.captured += 1
        return graph

    def release(self) -> None:
        self.seen.released += 1


class Poisoned(Slots):
    """A capture computes nothing: nobody may read what it left, nor what a slot held before it was filled."""

    def of_given(self, given: torch.Tensor) -> Slot:
        slot = super().of_given(given)
        if slot._source is None and not self.is_result(slot):
            _poison(slot)
        return slot

    def for_result(self, like: torch.Tensor, device: torch.device, taken: list[Slot]) -> Slot:
        slot = super().for_result(like, device, taken)
        _poison(slot)
        return slot


def _poison(slot: Slot) -> None:
    if slot.tensor.is_floating_point():
        slot._filled.fill_(float("nan"))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Blocks on a CPU are captured by a stand-in."""
    seen = StandIn()

    def make(session: Session) -> blocks.BlockGraphs:
        made = blocks.BlockGraphs(session, lambda _: _Recorder(seen, session))
        made.device_type = "cpu"
        return made

    monkeypatch.setattr(install, "BlockGraphs", make)
    monkeypatch.setattr(blocks, "Slots", Poisoned)
    for module in (dit_accel.call, dit_accel.run):
        monkeypatch.setattr(module, "is_captured", lambda _device: seen.now)
    return seen
