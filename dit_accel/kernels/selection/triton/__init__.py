"""Triton kernels of the selections, and their launchers."""
