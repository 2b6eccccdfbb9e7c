"""A list of the steps to compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar

from torch import nn

from ...layout import StepContext
from .continuation import Continuation
from .protocol import Reuse, Surroundings


@dataclass(frozen=True)
class Listed(Reuse):
    """What all blocks added in the last computed step, at every step that is not listed.

    The list is known before a run: no forward waits for the device, and a run takes as long with any weights. Lists
    come from measurements; cache-dit calls such a list a steps mask.

    Attributes:
        computed: the steps that run all blocks, from 0, in rising order. The first step of a run always does.
        num_steps: of the run that the list is for. In a run of another number the computed steps lie as on the list;
            :meth:`of_run` says how many there are.
        order: 1 continues what the blocks added in the last two computed steps in a straight line, 0 repeats the last.
        slope: share of the line's slope.
        correction: share of what the skipped steps before a computed one were off, as it shows, that those behind it
            make good; see :class:`~dit_accel.stages.reuse.continuation.Continuation`. It keeps what the blocks added
            in one step more.
        guided: those of the computed steps at which every guidance branch runs all blocks; empty for all of them. At
            the others the first branch alone does, mostly that of the prompt. What the blocks add in another one is
            then what they added in the first, less the difference of the two at the last guided step.
    """

    takes_dropped_stream: ClassVar[bool] = True

    computed: tuple[int, ...] = (0,)
    num_steps: int = 30
    order: int = 0
    guided: tuple[int, ...] = ()
    slope: float = 1.0
    correction: float = 0.0

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"reuse.num_steps must be at least 1, got {self.num_steps}.")
        if not self.computed or list(self.computed) != sorted(set(self.computed)):
            raise ValueError(f"reuse.computed must list different steps in rising order, got {self.computed}.")
        if self.computed[0] < 0 or self.computed[-1] >= self.num_steps:
            raise ValueError(f"reuse.computed must lie in 0 to {self.num_steps - 1}, got {self.computed}.")
        if self.order not in (0, 1):
            raise ValueError(f"reuse.order must be 0 or 1, got {self.order}.")
        for name in ("slope", "correction"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"reuse.{name} must lie in [0, 1], got {getattr(self, name)}.")
        if list(self.guided) != sorted(set(self.guided)) or not set(self.guided) <= set(self.computed):
            raise ValueError(
                f"reuse.guided must list steps of reuse.computed {self.computed} in rising order, got {self.guided}."
            )

    @property
    def shares_guidance(self) -> bool:
        return bool(self.guided)

    @property
    def continuation(self) -> Continuation:
        return Continuation(self.slope * self.order, self.correction)

    def shares(self, computed: Sequence[int], step: StepContext) -> tuple[float, ...]:
        """What stands for a step that is not listed, from the last computed ones, see :class:`Continuation`."""
        assert step.index is not None
        assert step.num_steps is not None
        listed = (one for one in self.of_run(step.num_steps) if one > step.index)
        upcoming = next(listed, step.num_steps)
        return self.continuation.shares(computed, step.index, upcoming, step.lengths)

    def computes(self, step: StepContext) -> bool:
        """Whether a step of a run is listed."""
        if step.index is None or not step.num_steps:
            return True
        return step.index in self.of_run(step.num_steps)

    def guides(self, step: StepContext) -> bool:
        """Whether all branches run all blocks, at a step that is listed."""
        if not self.guided or step.index is None or not step.num_steps:
            return True
        run = self.of_run(step.num_steps)
        # Where a run computes fewer steps than are listed, one may take the part of two. In whole numbers: a quotient
        # that is rounded up may lie behind the last step.
        places, of_list = len(run) - 1, max(len(self.computed) - 1, 1)
        return step.index in {run[-(-self.computed.index(one) * places // of_list)] for one in self.guided}

    def of_run(self, num_steps: int) -> tuple[int, ...]:
        """The steps to compute of a run of any number of steps, the first and the last of the list's kept.

        What a skipped step misses grows with how far the computed ones lie apart on the trajectory, so that a run of a
        third of the steps computes more than a third as many: their number goes with the cube root.
        """
        listed = self.computed
        wanted = round(len(listed) * (num_steps / self.num_steps) ** (1 / 3))
        count = 1 if len(listed) == 1 else min(max(wanted, 2), num_steps)
        scale = (num_steps - 1) / max(self.num_steps - 1, 1)
        found: list[int] = []
        for number in range(count):
            place = number * (len(listed) - 1) / max(count - 1, 1)
            before, behind = listed[int(place)], listed[ceil(place)]
            step = round((before + (behind - before) * (place % 1)) * scale)
            # A step of its own, and one left for each that comes.
            least = found[-1] + 1 if found else 0
            found.append(min(max(step, least), num_steps - count + number))
        return tuple(found)

    def apply(self, stand_in: nn.Module, blocks: Sequence[str], around: Surroundings) -> None:
        from .added import apply_added

        apply_added(
            stand_in,
            blocks,
            lambda: self.computes(around.step()),
            lambda: self.guides(around.step()),
            self.continuation.kept,
            lambda computed: self.shares(computed, around.step()),
        )

    def begin(self, state: Any, step: StepContext, leading: Any | None) -> None:
        state.begin(step.index, leading if self.guided else None)

    def force(self, state: Any) -> None:
        state.forced = True
