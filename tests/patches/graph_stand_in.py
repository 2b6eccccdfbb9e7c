"""CUDA graphs without a GPU: a replay runs the very operators that a capture saw, on the same memory, and no Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import dit_accel.call
import dit_accel.run
from dit_accel.patches.graphs import blocks, install, kept
from dit_accel.patches.graphs.static import Slot, Slots
from dit_accel.patches.session import Session
from tests.patches.tape import Tape


@dataclass
class StandIn:
    """Counts of what was captured and replayed.

    Attributes:
        captured: blocks.
        released: how often memory could go.
        replayed: calls of blocks.
        fails: raised behind what the next capture launches.
        now: whether something is captured now.
    """

    captured: int = 0
    replayed: int = 0
    released: int = 0
    fails: Exception | None = None
    now: bool = False


class _Graph:
    def __init__(self, seen: StandIn, tape: Tape) -> None:
        self.seen, self.tape = seen, tape

    def replay(self) -> None:
        self.seen.replayed += 1
        self.tape.replay()


class _Recorder:
    def __init__(self, seen: StandIn) -> None:
        self.seen = seen

    def capture(self, launch: Callable[[], None]) -> _Graph:
        tape = Tape()
        self.seen.now = True
        try:
            with tape:
                launch()
            if self.seen.fails is not None:
                raise self.seen.fails
        finally:
            self.seen.now = False
            tape.undo()
        self.seen.captured += 1
        return _Graph(self.seen, tape)

    def release(self) -> None:
        self.seen.released += 1


class Poisoned(Slots):
    """A capture computes nothing: nobody may read what it left, nor what a slot held before it was filled."""

    def of_given(self, given: torch.Tensor, taken: list[Slot]) -> Slot:
        slot = super().of_given(given, taken)
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
        made = blocks.BlockGraphs(session, lambda _: _Recorder(seen))
        made.device_type = "cpu"
        return made

    monkeypatch.setattr(install, "BlockGraphs", make)
    monkeypatch.setattr(kept, "Slots", Poisoned)
    for module in (dit_accel.call, dit_accel.run):
        monkeypatch.setattr(module, "is_captured", lambda _device: seen.now)
    return seen
