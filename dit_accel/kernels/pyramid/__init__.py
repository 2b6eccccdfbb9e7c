"""Attention over a pyramid of averaged keys."""
