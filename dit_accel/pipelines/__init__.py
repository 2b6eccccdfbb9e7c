"""Pipelines to run: loaded, built in, or real architectures with random weights."""
