"""Weights of dit_accel's larger built-in models; `dit_accel.pipelines.load` finds them here by name."""

__version__ = "0.1.0"
