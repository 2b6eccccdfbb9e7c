"""A list of the steps to compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar

from torch import nn

from ...layout import StepContext
from .protocol import Reuse, Surroundings


@dataclass(frozen=True)
class Listed(Reuse):
    """What all blocks added in the last computed step, at every step that is not listed.

    The list is known before a run: no forward waits for the device, and a run takes as long with any weights. Lists
    come from measurements; cache-dit calls such a list a steps mask.

    Attributes:
        computed: the steps that run all blocks, from 0, in rising order. The first step of a run always does.
        num_steps: of the run that the list is for. A run of another number computes about the same share of every
            part of the trajectory.
        order: 1 continues what the blocks added in the last two computed steps in a straight line, 0 repeats the last.
    """

    takes_dropped_stream: ClassVar[bool] = True

    computed: tuple[int, ...] = (0,)
    num_steps: int = 30
    order: int = 0

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"reuse.num_steps must be at least 1, got {self.num_steps}.")
        if not self.computed or list(self.computed) != sorted(set(self.computed)):
            raise ValueError(f"reuse.computed must list different steps in rising order, got {self.computed}.")
        if self.computed[0] < 0 or self.computed[-1] >= self.num_steps:
            raise ValueError(f"reuse.computed must lie in 0 to {self.num_steps - 1}, got {self.computed}.")
        if self.order not in (0, 1):
            raise ValueError(f"reuse.order must be 0 or 1, got {self.order}.")

    def computes(self, step: StepContext) -> bool:
        """Whether a step of a run is listed."""
        if step.index is None or not step.num_steps:
            return True
        if step.num_steps >= self.num_steps:
            return step.index * self.num_steps // step.num_steps in self.computed
        return self._begun(step.index + 1, step.num_steps) > self._begun(step.index, step.num_steps)

    def _begun(self, steps: int, num_steps: int) -> int:
        """How many of the first ``steps`` of a shorter run are computed: the share of those listed until there."""
        listed = sum(one * num_steps < steps * self.num_steps for one in self.computed)
        return ceil(listed * num_steps / self.num_steps)

    def apply(self, stand_in: nn.Module, blocks: Sequence[str], around: Surroundings) -> None:
        from .added import apply_added

        apply_added(stand_in, blocks, lambda: self.computes(around.step()), self.order)

    def begin(self, state: Any, step: StepContext) -> None:
        state.begin(step.index)

    def force(self, state: Any) -> None:
        state.forced = True
