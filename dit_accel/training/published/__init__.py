"""Checkpoints that others published, read by their names and shapes into adapters of this package."""
