"""Triton kernels of the linear branch, and their launchers."""
