"""The steps of a checkpoint that was distilled to few, as a scheduler of diffusers."""

from __future__ import annotations

import struct
from typing import Any
from zlib import crc32

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config

from ..few_steps import FewSteps

# Values of a sample's latents, at most, that tell it from any other. They lie all over the latents: what comes first
# may be a given picture, the same for each seed.
CONTENT = 256


class FewStepScheduler(FlowMatchEulerDiscreteScheduler):
    """Flow matching at a fixed list of noise levels.

    Pipelines give ``step`` no generator. New noise is therefore drawn from the first latents of a run, each sample's by
    itself: a seed then means the same clip every time, on every device, alone or in a batch.

    Args:
        few_step_sigmas: noise level of each step, falling.
        stochastic_sampling: each step goes to the clean estimate and adds new noise to the next level.
        others: of diffusers' scheduler.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        few_step_sigmas: tuple[float, ...] = (1.0,),  # noqa: ARG002 (register_to_config keeps it)
        stochastic_sampling: bool = False,
    ) -> None:
        super().__init__(num_train_timesteps=num_train_timesteps, shift=1.0, stochastic_sampling=stochastic_sampling)

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, **others: Any) -> None:
        """Take the list.

        Raises:
            ValueError: another number of steps, or levels of one's own.
        """
        sigmas = list(self.config.few_step_sigmas)  # type: ignore[attr-defined]
        own = next((name for name in ("sigmas", "timesteps") if others.get(name) is not None), None)
        if own is not None:
            raise ValueError(f"The checkpoint was distilled to the noise levels {sigmas}, give no {own}.")
        if num_inference_steps not in (None, len(sigmas)):
            raise ValueError(
                f"The checkpoint was distilled to {len(sigmas)} steps, give num_inference_steps={len(sigmas)}, got "
                f"{num_inference_steps}."
            )
        self._generators: list[torch.Generator] = []
        super().set_timesteps(device=device, sigmas=sigmas)  # type: ignore[misc]

    def step(self, model_output: Any, timestep: Any, sample: torch.Tensor, *more: Any, **others: Any) -> Any:
        """diffusers' step, with noise of the run's own where it adds some and no generator is given."""
        if self.config.stochastic_sampling and not more and others.get("generator") is None:  # type: ignore[attr-defined]
            if len(self._generators) != len(sample):
                self._generators = [_generator_of(one) for one in sample]
            others["generator"] = self._generators
        return super().step(model_output, timestep, sample, *more, **others)  # type: ignore[misc]


def _generator_of(sample: torch.Tensor) -> torch.Generator:
    """One for each content, on the CPU."""
    content = sample.flatten()
    values = content[:: -(-len(content) // CONTENT)].float().cpu().tolist()
    return torch.Generator().manual_seed(crc32(struct.pack(f"{len(values)}f", *values)))


def few_step_scheduler(steps: FewSteps) -> FewStepScheduler:
    """The scheduler of these steps."""
    return FewStepScheduler(few_step_sigmas=steps.sigmas, stochastic_sampling=steps.renoise)
