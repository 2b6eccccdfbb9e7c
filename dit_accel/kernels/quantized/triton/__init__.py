"""Triton kernels of quantised attention, and their launchers."""
