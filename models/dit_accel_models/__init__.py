"""Weights of dit_accel's built-in models and of their adapters; `dit_accel.pipelines.load` finds them here by name."""

__version__ = "0.1.0"
