"""What a model was trained to predict, and of which noisy latents: the velocity of a flow, or at discrete timesteps
noise, velocity or data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

DISCRETE = ("epsilon", "v_prediction", "sample")
Coefficients = tuple[torch.Tensor, torch.Tensor]
"""Of the data and of the noise, float32 ``[B]``."""


@dataclass(frozen=True, eq=False)
class NoiseProcess:
    """Noisy latents ``a * data + s * noise`` at a level in [0, 1], and what a model predicts of them.

    ============== ============================= ==================
    prediction     a, s                          predicted
    ============== ============================= ==================
    flow           1 - level, level              noise - data
    epsilon        roots of alpha and 1 - alpha  noise
    v_prediction   the same                      a * noise - s * data
    sample         the same                      data
    ============== ============================= ==================

    The level of a discrete schedule is the place among its timesteps: 0 is the first, 1 the last and noisiest.

    Attributes:
        prediction: one of the above.
        alphas: of a discrete schedule the products of its alphas, ``[T]``; None for flow matching.
        shift: of the levels that are drawn for flow matching.
        within: the levels that the transformer denoises.
    """

    prediction: str
    alphas: torch.Tensor | None = None
    shift: float = 1.0
    within: tuple[float, float] = (0.0, 1.0)

    @property
    def is_flow(self) -> bool:
        """Whether it is flow matching, whose levels are sigmas."""
        return self.alphas is None

    def draw(self, generator: torch.Generator, mean: float, std: float) -> float:
        """One level for training: of flow matching as :func:`draw_sigma` has it, of a
        discrete schedule any timestep alike."""
        if self.alphas is None:
            return draw_sigma(generator, mean, std, self.shift, self.within)
        last = len(self.alphas) - 1
        return int(torch.randint(last + 1, (), generator=generator)) / last

    def mix(self, data: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Noisy latents, ``data`` and ``noise`` ``[B, ...]``, ``level`` ``[B]`` or of the latents' shape."""
        a, s = self._latents(level, data)
        return a * data + s * noise

    def target(self, data: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """What is predicted, of the latents' shape."""
        of_data, of_noise = self._predicted(level, data)
        return of_data * data + of_noise * noise

    def clean(self, noisy: torch.Tensor, predicted: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """The data by a prediction. By noise alone there is none where alpha is 0."""
        (a, s), (p, q) = self._latents(level, noisy), self._predicted(level, noisy)
        return (q * noisy - s * predicted) / (a * q - s * p)

    def timestep(self, level: torch.Tensor, scale: float) -> torch.Tensor:
        """As the transformer takes it, float32 of ``level``'s shape.

        Args:
            scale: of a sample, from a sigma to its timestep; a discrete schedule has its own.
        """
        if self.alphas is None:
            return level * scale
        return (level * (len(self.alphas) - 1)).round()

    def _latents(self, level: torch.Tensor, like: torch.Tensor) -> Coefficients:
        level = _wide(level, like)
        if self.alphas is None:
            return 1.0 - level, level
        alpha = self.alphas.to(level.device)[self.timestep(level, 1.0).long()]
        return alpha.sqrt(), (1.0 - alpha).sqrt()

    def _predicted(self, level: torch.Tensor, like: torch.Tensor) -> Coefficients:
        a, s = self._latents(level, like)
        one, zero = torch.ones_like(a), torch.zeros_like(a)
        return {"flow": (-one, one), "epsilon": (zero, one), "v_prediction": (-s, a), "sample": (one, zero)}[
            self.prediction
        ]


def _wide(level: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return level if level.dim() == like.dim() else level.view(-1, *[1] * (like.dim() - 1))


def noise_process(pipe: Any, transformer: str, shift: float | None) -> NoiseProcess:
    """The process that a pipeline's scheduler denoises.

    Args:
        transformer: name of the trained one, of two experts.
        shift: of the drawn levels of flow matching; None takes the scheduler's.

    Raises:
        ValueError: the scheduler tells neither a flow nor the alphas of a discrete schedule.
    """
    scheduler = pipe.scheduler
    config = getattr(scheduler, "config", {})
    kind = config.get("prediction_type")
    if "FlowMatch" in type(scheduler).__name__ or (config.get("use_flow_sigmas") and kind == "flow_prediction"):
        return NoiseProcess("flow", None, sigma_shift(pipe, shift), sigma_range(pipe, transformer))
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if kind in DISCRETE and isinstance(alphas, torch.Tensor):
        return NoiseProcess(kind, alphas.float())
    raise ValueError(
        f"Fine-tuning needs a model of flow matching, or one of {', '.join(DISCRETE)} at discrete timesteps; "
        f"{type(pipe).__name__} comes with {type(scheduler).__name__} and prediction_type {kind!r}."
    )


def sigma_range(pipe: Any, name: str = "transformer") -> tuple[float, float]:
    """The sigmas that a transformer denoises: all, or its side of the boundary between two experts.

    Wan 2.2's ``transformer`` takes the timesteps from ``boundary_ratio`` up, ``transformer_2`` those below.
    """
    boundary = dict(getattr(pipe, "config", {})).get("boundary_ratio")
    if boundary is None or getattr(pipe, "transformer_2", None) is None:
        return 0.0, 1.0
    return (float(boundary), 1.0) if name == "transformer" else (0.0, float(boundary))


def sigma_shift(pipe: Any, shift: float | None) -> float:
    """The shift of sigmas that are drawn: the one given, or else the scheduler's."""
    return shift or float(getattr(pipe.scheduler.config, "shift", None) or 1.0)


def draw_sigma(
    generator: torch.Generator, mean: float, std: float, shift: float, within: tuple[float, float] = (0.0, 1.0)
) -> float:
    """One sigma in (0, 1): logit-normal, then shifted as flow-matching schedulers do.

    Args:
        within: drawn again until it lies in this range; after a thousand times spread evenly over it.
    """
    low, high = within
    for _ in range(1000):
        normal = torch.randn((), generator=generator, dtype=torch.float64) * std + mean
        sigma = torch.sigmoid(normal)
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
        if low <= sigma <= high:
            return float(sigma)
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))
