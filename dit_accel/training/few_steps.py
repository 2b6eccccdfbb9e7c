"""A model distilled to few steps: at which noise levels, and how a step goes from one to the next."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch


@dataclass(frozen=True)
class FewSteps:
    """The steps that a checkpoint was distilled to.

    Attributes:
        sigmas: noise level of each step, falling.
        renoise: each step goes to the clean estimate and adds new noise, as distribution matching and rCM do; else it
            is Euler's.
    """

    sigmas: tuple[float, ...]
    renoise: bool

    @classmethod
    def from_dict(cls, data: Any) -> FewSteps:
        """From plain data, as ``dataclasses.asdict`` gives it.

        Raises:
            ValueError: it is something else; the message ends a sentence.
        """
        known = data if isinstance(data, dict) else {}
        sigmas, renoise = known.get("sigmas"), known.get("renoise")
        if (
            not isinstance(renoise, bool)
            or not isinstance(sigmas, (list, tuple))
            or not sigmas
            or not all(isinstance(sigma, (int, float)) and 0.0 < sigma <= 1.0 for sigma in sigmas)
            or any(later >= sigma for sigma, later in pairwise(sigmas))
        ):
            raise ValueError(f"steps need falling sigmas in (0, 1] and renoise, got {data!r}")
        return cls(tuple(map(float, sigmas)), renoise)


@dataclass(frozen=True)
class FewStepConfig:
    """How a model is distilled to few steps.

    Attributes:
        steps: of the distilled model.
        teacher_steps: of the dense teacher's run, whose noise levels the distilled ones are among.
        guidance: scale of the teacher's guidance, which the distilled model then has without a second forward; 1 is
            none.
        critic_updates: of distribution matching, updates of the critic before each of the model.
        critic_rate: learning rate of the critic; None takes the model's.
    """

    steps: int = 4
    teacher_steps: int = 30
    guidance: float = 1.0
    critic_updates: int = 5
    critic_rate: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "critic_updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"few_steps.{name} must be at least 1, got {getattr(self, name)}.")
        if self.teacher_steps < self.steps:
            raise ValueError(
                f"few_steps.teacher_steps must be at least the {self.steps} steps of the distilled model, got "
                f"{self.teacher_steps}."
            )
        if not 1.0 <= self.guidance < float("inf"):
            raise ValueError(f"few_steps.guidance must be at least 1, got {self.guidance}.")
        if self.critic_rate is not None and not self.critic_rate > 0.0:
            raise ValueError(f"few_steps.critic_rate must be above 0, got {self.critic_rate}.")


@dataclass(frozen=True)
class Trajectory:
    """The noise levels of a teacher's run, cut into as many segments as a distilled model has steps.

    Attributes:
        levels: of flow matching, from 1 down to 0, one more than the teacher has steps.
        edges: indices into them at which a segment begins, and the last.
    """

    levels: tuple[float, ...]
    edges: tuple[int, ...]

    @classmethod
    def of(cls, config: FewStepConfig, shift: float) -> Trajectory:
        """Evenly spread levels under a scheduler's shift; segments of as equal a number of them as there can be."""
        count = config.teacher_steps
        levels = tuple(_shifted(1.0 - n / count, shift) for n in range(count + 1))
        return cls(levels, tuple(round(n * count / config.steps) for n in range(config.steps + 1)))

    def steps(self, renoise: bool) -> FewSteps:
        """The distilled model's."""
        return FewSteps(tuple(self.levels[edge] for edge in self.edges[:-1]), renoise)

    def draw(self, generator: torch.Generator) -> float:
        """A level at which a teacher's step begins, all alike."""
        return self.levels[int(torch.randint(len(self.levels) - 1, (), generator=generator))]

    def after(self, level: float) -> tuple[float, float]:
        """The next of the teacher's levels, and that at which the segment ends."""
        index = min(range(len(self.levels) - 1), key=lambda n: abs(self.levels[n] - level))
        return self.levels[index + 1], self.levels[self.edges[bisect_right(self.edges, index)]]


def _shifted(sigma: float, shift: float) -> float:
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


Velocity = Callable[[torch.Tensor, float], torch.Tensor]
"""A model's velocity of latents ``[B, ...]`` at a noise level of flow matching."""


def denoise(
    velocity: Velocity,
    noise: torch.Tensor,
    levels: tuple[float, ...],
    fresh: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    """The clean latents of a run from noise: Euler's steps, or with ``fresh`` noise each to the clean estimate, and on
    to the next level.

    Args:
        levels: of each step, falling; the last goes to 0.
    """
    latents = noise
    for level, later in zip(levels, (*levels[1:], 0.0), strict=True):
        told = velocity(latents, level)
        if fresh is None:
            latents = latents + (later - level) * told
        else:
            clean = latents - level * told
            latents = (1.0 - later) * clean + later * fresh() if later else clean
    return latents
