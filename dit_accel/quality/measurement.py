"""What a metric gives: a number, or the reason why there is none."""

from __future__ import annotations

import math
from dataclasses import dataclass


class MetricUnavailable(RuntimeError):
    """A metric cannot be computed here; the message says why and what would change that."""


class MissingExtra(MetricUnavailable):
    """A metric needs something that an optional extra of this package installs."""

    def __init__(self, metric: str, extra: str, what: str, detail: str = "") -> None:
        self.extra = extra
        sentence = f"{metric} needs {what}: pip install 'dit-accel[{extra}]'."
        super().__init__(f"{sentence} {detail}".strip())


@dataclass(frozen=True)
class Measurement:
    """One metric on one clip: exactly one of ``value`` and ``reason`` is set.

    A metric that could not run has a reason and no value, so that it can never be read as a zero. ``value``
    may be infinite (PSNR of identical clips) but never NaN.
    """

    value: float | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        if (self.value is None) == (self.reason is None):
            raise ValueError(
                f"a Measurement has either a value or a reason, got value={self.value!r} and reason={self.reason!r}."
            )
        if self.value is not None and math.isnan(self.value):
            raise ValueError("a Measurement's value must not be NaN; give a reason instead.")


def number_to_json(value: float) -> float | str:
    """A float as JSON can hold it: finite as is, infinities as ``"inf"`` and ``"-inf"``."""
    if math.isnan(value):
        raise ValueError("NaN cannot be reported; a metric without a value needs a reason.")
    return value if math.isfinite(value) else ("inf" if value > 0 else "-inf")


def number_from_json(value: float | str) -> float:
    """Inverse of :func:`number_to_json`."""
    return float(value)
