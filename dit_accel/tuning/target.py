"""What a user asks of a whole run: an error to dense, or a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..quality.metrics import METRICS, Metric

ERRORS = ("psnr", "ssim", "lpips")
"""Metrics that a target may name."""

SPEEDUP = "speedup"
SMALLEST = 1e-12
"""An error that counts as none."""


@dataclass(frozen=True)
class Target:
    """A bound on one number of a whole run.

    Attributes:
        name: "psnr" (dB to dense), "ssim", "lpips", or "speedup" (time of a dense run over that of a fast one).
        value: the least, of LPIPS the most, that is allowed: of the mean over prompts.
    """

    name: str
    value: float

    def __post_init__(self) -> None:
        allowed = {"psnr": (0.0, math.inf), "ssim": (0.0, 1.0), "lpips": (0.0, math.inf), SPEEDUP: (1.0, math.inf)}
        if self.name not in allowed:
            raise ValueError(f"target must name one of {', '.join(allowed)}, got {self.name!r}.")
        low, high = allowed[self.name]
        if not low < self.value < high:
            bound = f"above {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise ValueError(f"target {self.name} must be finite and {bound}, got {self.value:g}.")

    @classmethod
    def read(cls, text: str) -> Target:
        """A target from ``NAME=VALUE``, such as ``psnr=35``.

        Raises:
            ValueError: another form, an unknown name, or a value that cannot be.
        """
        name, equals, value = text.partition("=")
        try:
            number = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"target must be NAME=VALUE, such as psnr=35 or speedup=2.5, got {text!r}.")
        return cls(name.strip(), number)

    def __str__(self) -> str:
        return f"{self.name}={self.value:g}"

    @property
    def is_speed(self) -> bool:
        return self.name == SPEEDUP

    @property
    def metric(self) -> Metric:
        """What fidelity is told in: the target's own metric, PSNR beside a time."""
        return METRICS["psnr" if self.is_speed else self.name]

    def is_met(self, fidelity: float, speedup: float) -> bool:
        """Whether a run meets the target, and is faster than dense.

        Args:
            fidelity: in :attr:`metric`, the mean over prompts.
        """
        if self.is_speed:
            return speedup >= self.value
        kept = fidelity >= self.value if self.metric.higher_is_better else fidelity <= self.value
        return kept and speedup > 1.0


def error_of(name: str, value: float) -> float:
    """A metric's value as an error that adds up: squared differences, or what is quadratic in small ones."""
    error = {"psnr": 10.0 ** (-value / 10.0), "ssim": 1.0 - value, "lpips": value}[name]
    return max(error, SMALLEST)


def fidelity_of(name: str, errors: Sequence[float] | np.ndarray) -> float:
    """The mean over prompts of a metric, from their errors."""
    values = np.maximum(np.asarray(errors, dtype=np.float64), SMALLEST)
    return float(np.mean({"psnr": -10.0 * np.log10(values), "ssim": 1.0 - values, "lpips": values}[name]))
