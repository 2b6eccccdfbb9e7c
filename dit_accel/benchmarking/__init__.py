"""Timing a transformer, dense and patched."""
