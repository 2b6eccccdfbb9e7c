"""The registry of paired metrics, and how to run them on one pair of clips."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Protocol

from .flicker import Flicker, FlickerExcess, FlickerFlow
from .lpips import Lpips
from .measurement import Measurement, MetricUnavailable
from .pixel import LatentMse, Psnr, Ssim
from .video import ClipPair
from .vmaf import Vmaf


class Metric(Protocol):
    """A paired metric: plain data that names itself, and a call that gives one number per clip."""

    @property
    def name(self) -> str:
        """Key in reports and on the command line."""

    @property
    def label(self) -> str:
        """Column heading."""

    @property
    def unit(self) -> str:
        """Unit of the value, or an empty string."""

    @property
    def higher_is_better(self) -> bool:
        """Which way fidelity grows."""

    @property
    def digits(self) -> int:
        """Decimals worth printing."""

    def __call__(self, pair: ClipPair) -> float:
        """The value for one pair.

        Raises:
            MetricUnavailable: it cannot be computed; the message says why.
        """


_METRICS: tuple[Metric, ...] = (
    Psnr(),
    Ssim(),
    Lpips(),
    Vmaf(),
    Flicker(),
    FlickerFlow(),
    FlickerExcess(),
    LatentMse(),
)
METRICS: Mapping[str, Metric] = MappingProxyType({metric.name: metric for metric in _METRICS})
"""Every metric by name, in the order of a report's columns."""


def find_metrics(names: Iterable[str] | None = None) -> tuple[Metric, ...]:
    """Metrics of these names, or all of them.

    Raises:
        ValueError: an unknown name.
    """
    if names is None:
        return _METRICS
    found = []
    for name in names:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}; known are {', '.join(METRICS)}.")
        found.append(METRICS[name])
    return tuple(found)


def measure(pair: ClipPair, metrics: Iterable[Metric] = _METRICS) -> dict[str, Measurement]:
    """Run metrics on one pair; one that cannot run is recorded with its reason."""
    results: dict[str, Measurement] = {}
    for metric in metrics:
        try:
            value = metric(pair)
            reason = f"{metric.label} came out as NaN." if math.isnan(value) else None
            results[metric.name] = Measurement(None if reason else value, reason)
        except MetricUnavailable as error:
            results[metric.name] = Measurement(reason=str(error))
    return results
