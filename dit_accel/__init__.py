"""Faster diffusion transformers for video and images."""

__version__ = "0.1.0"
