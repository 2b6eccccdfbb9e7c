"""Triton kernels of pyramid attention, and their launchers."""
