"""Triton kernels for every GPU, and their launchers."""
