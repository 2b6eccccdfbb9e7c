"""A reuse across steps: from a share of the run on, every second step."""

from __future__ import annotations

from dataclasses import dataclass

import dit_accel
from dit_accel.layout import StepContext
from dit_accel.stages.reuse.listed import Listed


@dit_accel.register("alternate")
@dataclass(frozen=True)
class Alternate(Listed):
    """What all blocks added in the last computed step, at every second step after the first ones.

    Attributes:
        begin_at: share of the steps, from the first, that are all computed.
    """

    begin_at: float = 0.5

    def computes(self, step: StepContext) -> bool:
        if step.index is None or not step.num_steps:
            return True
        return step.index < self.begin_at * step.num_steps or step.index % 2 == 0
