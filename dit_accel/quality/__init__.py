"""How close accelerated clips stay to dense ones: paired metrics, intervals, reports."""

from dit_accel.quality.bootstrap import Interval, bootstrap_mean
from dit_accel.quality.measurement import Measurement, MetricUnavailable, MissingExtra
from dit_accel.quality.metrics import METRICS, Metric, find_metrics, measure
from dit_accel.quality.video import ClipPair, as_video

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
