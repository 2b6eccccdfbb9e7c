"""Which steps to compute: lists that lose least, by the bend of the trajectory of a dense run.

A skipped step continues the last two computed ones in a straight line (:class:`~dit_accel.stages.reuse.listed.Listed`,
``order=1``). Of a dense run it is known what every step gave, so that the error of each continuation is known without
another run. SmoothCache (arXiv 2411.10510) and MagCache (arXiv 2506.09045) decide from such differences step by step;
here the whole list is chosen at once, by dynamic programming over the gaps between computed steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

LONGEST_GAP = 12
"""Steps from a computed one to the next, at most."""

SAMPLED = 2**16
"""Values of the latents that a trajectory is known by."""


def sampled(latents: torch.Tensor) -> torch.Tensor:
    """Evenly spaced values of the latents after a step, float32 on the CPU."""
    flat = latents.detach().flatten()
    return flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].float().cpu()


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What the steps of a dense run gave.

    Attributes:
        gram: float64 ``[N, N]``, inner products of the velocities of N steps, their mean square being 1.
    """

    gram: np.ndarray

    @classmethod
    def of_latents(cls, latents: Sequence[torch.Tensor], sigmas: Sequence[float], num_steps: int) -> Trajectory:
        """From what :func:`sampled` found before the first step and after each.

        Args:
            latents: one tensor more than there are steps. Of as many as steps the first is taken to be missing, and
                the first step's velocity to follow from the next two in a straight line.
            sigmas: noise levels of the steps and behind the last; where they are fewer, all steps go equally far.
        """
        count = num_steps
        spaced = np.abs(np.diff(np.asarray(sigmas[: count + 1], dtype=np.float64)))
        far = spaced if len(spaced) == count and bool((spaced > 0).all()) else np.ones(count)
        positions = torch.stack(list(latents)).double().numpy()
        velocities = np.diff(positions, axis=0) / far[1 + count - len(positions) :, None]
        if len(velocities) < count:
            first = 2.0 * velocities[:1] - velocities[1:2] if count > 2 else velocities[:1]
            velocities = np.concatenate([first, velocities])
        gram = velocities @ velocities.T
        return cls(gram / max(float(np.trace(gram)) / count, 1e-300))

    @classmethod
    def usual(cls, num_steps: int) -> Trajectory:
        """Where a pipeline shows no latents: bent most at the beginning."""
        velocity = np.exp(-4.0 * np.arange(num_steps) / num_steps)
        gram = np.outer(velocity, velocity)
        return cls(gram / (np.trace(gram) / num_steps))

    @classmethod
    def mean(cls, several: Sequence[Trajectory]) -> Trajectory:
        """Of several prompts."""
        return cls(np.mean([one.gram for one in several], axis=0))

    @property
    def num_steps(self) -> int:
        return len(self.gram)

    def gap(self, before: int, last: int, upcoming: int) -> float:
        """Squared error of the velocities between two computed steps; those of one gap add up as vectors.

        All steps count alike, however far they go: an error of an early step is amplified by all that follow. On the
        embedded model, whose last steps go eight times as far as its first, lists that weigh steps by how far they go
        lost 3 dB more (the mean of 9, 13 and 19 of 30 steps, 64 x 64 pixels, two prompts of no table).

        Args:
            before, last: the two computed steps that are continued; equal where there is one alone.
            upcoming: the next computed step.
        """
        if upcoming - last < 2:
            return 0.0
        steps = np.arange(last + 1, upcoming)
        slope = (steps - last) / (last - before) if last > before else np.zeros(len(steps))
        names = np.concatenate([[before, last], steps])
        factors = np.concatenate([[-slope.sum(), (1.0 + slope).sum()], -np.ones(len(steps))])
        return max(0.0, float(factors @ self.gram[np.ix_(names, names)] @ factors))

    def score(self, computed: Sequence[int]) -> float:
        """Squared error of a list, summed over its gaps: in units of its own, to compare lists by."""
        padded = [computed[0], *computed, self.num_steps]
        return sum(self.gap(*padded[place : place + 3]) for place in range(len(computed)))


def best_lists(trajectory: Trajectory, required: Iterable[int] = ()) -> dict[int, tuple[int, ...]]:
    """For every number of computed steps the list with the lowest score.

    Args:
        required: steps that every list has; the first two and the last, whose error nothing takes back, are always.
    """
    total = trajectory.num_steps
    must = {0, min(1, total - 1), total - 1, *required}
    reach = min(LONGEST_GAP, total)
    # costs[last, back, ahead]: a gap from `last` to `last + ahead`, behind one of `back` (0: there is none).
    costs = np.full((total, reach + 1, reach + 1), np.inf)
    for last in range(total):
        for ahead in range(1, min(reach, total - 1 - last) + 1):
            if any(step in must for step in range(last + 1, last + ahead)):
                break
            for back in range(min(reach, last) + 1):
                if (back == 0) == (last == 0):
                    costs[last, back, ahead] = trajectory.gap(last - back, last, last + ahead)
    # scores[step, back]: the best list that ends with a step, `back` behind its last but one.
    scores = np.full((total, reach + 1), np.inf)
    scores[0, 0] = 0.0
    found: dict[int, tuple[int, ...]] = {}
    came_from: list[np.ndarray] = []
    for count in range(2, total + 1):
        through = scores[:, :, None] + costs
        best, behind = through.min(1), through.argmin(1)
        scores = np.full_like(scores, np.inf)
        source = np.zeros(scores.shape, dtype=np.int64)
        for ahead in range(1, reach + 1):
            scores[ahead:, ahead] = best[: total - ahead, ahead]
            source[ahead:, ahead] = behind[: total - ahead, ahead]
        came_from.append(source)
        if np.isfinite(scores[total - 1]).any():
            found[count] = _traced(came_from, total - 1, int(scores[total - 1].argmin()))
    return found


def _traced(came_from: Sequence[np.ndarray], step: int, back: int) -> tuple[int, ...]:
    steps = [step]
    for source in reversed(came_from):
        step, back = step - back, int(source[step, back])
        steps.append(step)
    return tuple(reversed(steps))
