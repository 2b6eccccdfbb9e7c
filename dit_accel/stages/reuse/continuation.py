"""What stands for a skipped step, as shares of what the last computed ones differ by.

A denoising run integrates the model's output over the noise level, and skipped steps are integrated from older outputs:
a multistep method, as DPM-Solver++ and UniPC are, on the steps of any scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STRONGEST = 3.0
"""How much stronger than the mean difference of the skipped steps, at most, those behind them are changed."""


@dataclass(frozen=True)
class Continuation:
    """A line through the last two computed steps, and what the skipped steps before the last one were off.

    The line may be flatter than the two steps say: what a prompt's details add changes from one computed step to the
    next in ways that do not go on. Once the next step is computed, it is known where the line should have gone; the
    difference, summed over the skipped steps and each by how far it went, is spread over the next ones that are
    skipped. It is the corrector of a predictor-corrector method without a second evaluation, as in UniPC (arXiv
    2302.04867), which changes the latents at once; here they belong to the scheduler.

    Attributes:
        slope: share of the line's slope; 0 repeats the last computed step.
        correction: share of the difference that is made good.
    """

    slope: float
    correction: float

    @property
    def kept(self) -> int:
        """How many computed steps it looks at."""
        return 1 + (self.slope > 0.0 or self.correction > 0.0) + (self.slope > 0.0 and self.correction > 0.0)

    def shares(self, computed: Sequence[int], step: int, upcoming: int, lengths: Sequence[float]) -> tuple[float, ...]:
        """What to add to the last computed step: shares of its difference to the one before, and of that one's.

        Args:
            computed: the last steps that were computed, rising, one at least.
            step: the skipped one.
            upcoming: the next that will be computed, or the number of steps.
            lengths: how far each step of the run goes.

        Returns:
            As many as differences of ``computed`` count, the latest first.
        """
        *earlier, last = computed[-self.kept :]
        if not earlier:
            return ()
        before = earlier[-1]
        line = self.slope * (step - last) / (last - before)
        skipped = range(before + 1, last)
        # What a short last step would have to make good by itself is more than it can.
        ahead = max(sum(lengths[last + 1 : upcoming]), sum(lengths[one] for one in skipped) / STRONGEST)
        if not self.correction or not ahead:
            return (line,)
        share = self.correction / ahead
        due = share * sum(lengths[one] * (one - before) for one in skipped) / (last - before)
        if len(earlier) < 2 or not self.slope:
            return (line + due,)
        gone = share * self.slope * sum(lengths[one] * (one - before) for one in skipped) / (before - earlier[-2])
        return line + due, -gone
