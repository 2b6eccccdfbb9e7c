"""Weights of dit_accel's built-in model at real length; `dit_accel.pipelines.load("embedded-long")` finds them here."""

__version__ = "0.1.0"
