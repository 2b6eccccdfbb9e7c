"""Densities and masses as integers, so that every implementation counts alike."""

from __future__ import annotations

import torch

PPM = 1_000_000
"""Densities and masses are resolved to parts per million."""

WEIGHT_ONE = 1 << 28
"""Integer weight of the best candidate; 16,384 blocks of it times PPM still fit 63 bits."""


def share_in_ppm(value: float | torch.Tensor, name: str, device: torch.device) -> int | torch.Tensor:
    """A share in (0, 1] as an integer in parts per million; a tensor becomes int64 ``[B|1, H|1]``."""
    if isinstance(value, torch.Tensor):
        ppm = (value.to(device, torch.float64) * PPM).round().to(torch.int64).clamp(1, PPM)
        return ppm if ppm.dim() == 2 else ppm.reshape((1,) * (2 - ppm.dim()) + tuple(ppm.shape))
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{name} must lie in (0, 1], got {value}.")
    return max(1, round(value * PPM))
