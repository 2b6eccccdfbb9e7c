"""How close accelerated clips stay to dense ones: paired metrics, intervals, reports."""

from .bootstrap import Interval, bootstrap_mean
from .measurement import Measurement, MetricUnavailable, MissingExtra
from .metrics import METRICS, Metric, find_metrics, measure
from .video import ClipPair, as_video

__all__ = [
    "METRICS",
    "ClipPair",
    "Interval",
    "Measurement",
    "Metric",
    "MetricUnavailable",
    "MissingExtra",
    "as_video",
    "bootstrap_mean",
    "find_metrics",
    "measure",
]
