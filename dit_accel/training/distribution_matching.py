"""Distillation to few steps by matching distributions: the model, and the critic that knows what it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..patches.learned import is_learned
from .config import FinetuneConfig
from .few_steps import Trajectory, denoise
from .noisy import NoisyBatch, guided, mean_square, velocity
from .trainables import Trainables

LOWEST, HIGHEST = 0.02, 0.98
"""Between which noise levels distributions are compared, before the shift: at the ends they tell nothing."""


def generated(model: Any, batch: NoisyBatch, trajectory: Trajectory, stop: int, gradient: bool = True) -> torch.Tensor:
    """The clean estimate of the model's own run after ``stop + 1`` of its steps, float32, with a gradient for the last.

    The run is that of inference: every step goes to the clean estimate, and adds new noise.
    """
    levels = trajectory.steps(renoise=True).sigmas[: stop + 1]

    def told(latents: torch.Tensor, level: float) -> torch.Tensor:
        with torch.set_grad_enabled(gradient and level == levels[-1]):
            return velocity(model, batch.at(latents, level))

    return denoise(told, batch.noise(), levels, batch.noise)


def noised_again(batch: NoisyBatch, made: torch.Tensor, shift: float) -> tuple[NoisyBatch, torch.Tensor]:
    """Made latents at a level drawn anew, and the noise that was added."""
    level = LOWEST + (HIGHEST - LOWEST) * batch.uniform()
    level = shift * level / (1.0 + (shift - 1.0) * level)
    noise, wide = batch.noise(), level.view(-1, *[1] * (made.dim() - 1))
    return batch.at((1.0 - wide) * made + wide * noise, level), noise


def matching_loss(made: torch.Tensor, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Loss whose gradient takes made latents from where the critic sees them to where the teacher does (DMD, arXiv
    2311.18828): ``(fake - real) / mean |made - real|`` over the number of values, a 0-d tensor.

    Args:
        made: the model's clean latents ``[B, ...]``, with a gradient.
        real, fake: clean estimates of the noised ones by the teacher and by the critic.
    """
    size = (made.detach() - real).abs().flatten(1).mean(1).clamp_min(torch.finfo(torch.float32).tiny)
    direction = (fake - real) / size.view(-1, *[1] * (made.dim() - 1))
    return 0.5 * F.mse_loss(made, (made - direction).detach())


def distribution_loss(
    model: Any,
    teacher: AbstractContextManager[None],
    critic: AbstractContextManager[None],
    batch: NoisyBatch,
    trajectory: Trajectory,
    stop: int,
    guidance: float,
    shift: float,
) -> torch.Tensor:
    """Distribution matching with backward simulation (DMD2, arXiv 2405.14867), a 0-d tensor.

    Args:
        model: the patched transformer; it may be wrapped for several devices.
        teacher, critic: contexts in which it is the dense teacher, and the critic.
        stop: the step of the model's run that is trained.
        guidance: scale of the teacher's.
        shift: of the levels at which distributions are compared.
    """
    made = generated(model, batch, trajectory, stop)
    with torch.no_grad():
        again, _ = noised_again(batch, made, shift)
        level = again.level.view(-1, *[1] * (made.dim() - 1))
        with teacher:
            real = again.latents.float() - level * guided(model, again, guidance)
        with critic:
            fake = again.latents.float() - level * velocity(model, again)
    return matching_loss(made, real, fake)


class Critic:
    """The velocity field of what the model makes: a second set of values for its trained parameters, run dense.

    It begins as the model before the training. Parameters of the recipe have no part in it.

    Args:
        trainables: of the model, which has not been trained yet.
        config: of the training.
        reduce: mean over the processes.
    """

    def __init__(
        self, trainables: Trainables, config: FinetuneConfig, reduce: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self.trainables, self.config, self.reduce = trainables, config, reduce
        self.values = {
            name: nn.Parameter(value.detach().clone())
            for name, value in trainables.named().items()
            if not is_learned(name)
        }
        self.optimizer = torch.optim.AdamW(
            self.values.values(),
            lr=config.few_steps.critic_rate or config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )

    @contextmanager
    def present(self) -> Iterator[None]:
        """The model is the critic while the context is open."""
        own = {name: value for name, value in self.trainables.named().items() if name in self.values}
        before = {name: (parameter.data, parameter.grad) for name, parameter in own.items()}
        with self.trainables.handle.disabled():
            for name, parameter in own.items():
                parameter.data, parameter.grad = self.values[name].data, None
            try:
                yield
            finally:
                for name, parameter in own.items():
                    parameter.data, parameter.grad = before[name]

    def update(self, batch: NoisyBatch, made: torch.Tensor, shift: float) -> torch.Tensor:
        """One step towards the velocity of made latents; its loss before, a 0-d tensor.

        Args:
            made: the model's clean latents.
        """
        again, noise = noised_again(batch, made, shift)
        with self.present():
            # Not the wrapped model, which expects a gradient of every trained parameter.
            loss = mean_square(velocity(self.trainables.model, again), noise - made)
            loss.backward()
            own = self.trainables.named()
            for name, value in self.values.items():
                gradient = own[name].grad
                value.grad = None if gradient is None else self.reduce(gradient)
        nn.utils.clip_grad_norm_(self.values.values(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """Values and optimizer, for a checkpoint."""
        values = {name: value.detach() for name, value in self.values.items()}
        return {"values": values, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        with torch.no_grad():
            for name, value in self.values.items():
                value.copy_(state["values"][name])
        self.optimizer.load_state_dict(state["optimizer"])
