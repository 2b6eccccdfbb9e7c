"""The steps of a checkpoint that was distilled to few, as a scheduler of diffusers."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config

from ..few_steps import FewSteps


class FewStepScheduler(FlowMatchEulerDiscreteScheduler):
    """Flow matching at a fixed list of noise levels.

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
        super().set_timesteps(device=device, sigmas=sigmas)  # type: ignore[misc]


def few_step_scheduler(steps: FewSteps) -> FewStepScheduler:
    """The scheduler of these steps."""
    return FewStepScheduler(few_step_sigmas=steps.sigmas, stochastic_sampling=steps.renoise)
