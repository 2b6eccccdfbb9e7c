"""A batch of noisy latents, and what a model predicts of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class NoisyBatch:
    """A batch at one point of the noise schedule.

    Attributes:
        latents: noisy ``[B, ...]``; of flow matching ``(1 - sigma) * data + sigma * noise``.
        target: what the model is to predict, likewise; of flow matching the velocity ``noise - data``.
        timestep: ``[B]``, or ``[B, N]`` for N tokens or frames, as the transformer takes it.
        condition: the other arguments of the transformer's forward.
        level: noise level ``[B]``, see :class:`~dit_accel.training.noise.NoiseProcess`.
        timesteps: what makes timesteps of levels.
        noised: 1 where latents are noised, 0 where they are clean and no loss is taken, to broadcast; None: all are.
        unconditional: the other arguments without the prompts, where the samples have them.
        generators: of each sample's noise.
    """

    latents: torch.Tensor
    target: torch.Tensor
    timestep: torch.Tensor
    condition: dict[str, Any]
    level: torch.Tensor
    timesteps: Callable[[torch.Tensor], torch.Tensor]
    noised: torch.Tensor | None = None
    unconditional: dict[str, Any] | None = None
    generators: Sequence[torch.Generator] = ()

    def at(self, latents: torch.Tensor, level: torch.Tensor | float) -> NoisyBatch:
        """The same samples with other latents, at another level."""
        if isinstance(level, float):
            level = torch.full_like(self.level, level)
        return replace(self, latents=latents.to(self.latents.dtype), level=level, timestep=self.timesteps(level))

    def noise(self) -> torch.Tensor:
        """New noise of the samples' own generators, float32, of the latents' shape."""
        shape = self.latents.shape[1:]
        # Drawn on the CPU, so that a seed means the same on every device.
        drawn = torch.stack([torch.randn(shape, generator=generator) for generator in self.generators])
        return drawn.to(self.latents.device)

    def uniform(self) -> torch.Tensor:
        """New numbers in [0, 1) of the samples' own generators, float32 ``[B]``."""
        drawn = torch.stack([torch.rand((), generator=generator) for generator in self.generators])
        return drawn.to(self.latents.device)


def velocity(model: Callable[..., Any], batch: NoisyBatch) -> torch.Tensor:
    """What the model predicts for a batch, in float32: its velocity, or noise, or data."""
    prediction: torch.Tensor = model(
        hidden_states=batch.latents, timestep=batch.timestep, return_dict=False, **batch.condition
    )[0]
    if prediction.shape != batch.latents.shape:
        # Of models that also predict a variance, behind the mean in the channels.
        prediction = prediction[:, : batch.latents.shape[1]]
    return prediction.float()


def guided(model: Callable[..., Any], batch: NoisyBatch, guidance: float) -> torch.Tensor:
    """A prediction with classifier-free guidance; a scale of 1 is none.

    Raises:
        ValueError: the samples do not have what the model is given without a prompt.
    """
    told = velocity(model, batch)
    if guidance == 1.0:
        return told
    if batch.unconditional is None:
        raise ValueError(
            f"few_steps.guidance {guidance:g} needs samples with what the model is given without a prompt; make them "
            "anew, or take guidance 1."
        )
    without = velocity(model, replace(batch, condition=batch.unconditional))
    return without + guidance * (told - without)


def mean_square(got: torch.Tensor, wanted: torch.Tensor, noised: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared difference over what is noised, a 0-d tensor."""
    square = (got.float() - wanted.float()).square()
    if noised is None:
        return square.mean()
    weight = noised.expand(square.shape)
    return (square * weight).sum() / weight.sum().clamp(min=1.0)
