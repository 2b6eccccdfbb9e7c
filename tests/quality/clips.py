"""Small clips with content that moves, made by formula."""

from __future__ import annotations

import math

import torch


def moving_clip(frames: int = 6, height: int = 72, width: int = 96, speed: float = 2.0) -> torch.Tensor:
    """A textured pattern moving right by ``speed`` pixels a frame: ``[F, H, W, 3]`` in [0, 1]."""
    y = torch.arange(height).view(-1, 1, 1).double()
    x = torch.arange(width).view(1, -1, 1).double()
    phase = torch.tensor([0.0, 1.0, 2.0]).double()
    pictures = []
    for t in range(frames):
        u = x - speed * t
        coarse = torch.sin(0.13 * u + 0.09 * y + phase) + torch.cos(0.07 * u - 0.17 * y + 2 * phase)
        fine = torch.sin(0.71 * u + 0.33 * y) * torch.sin(0.29 * u - 0.57 * y + phase)
        pictures.append(0.5 + 0.17 * coarse + 0.12 * fine)
    return torch.stack(pictures).clamp(0, 1).float()


def with_noise(clip: torch.Tensor, std: float, seed: int = 0) -> torch.Tensor:
    """Gaussian noise of this standard deviation, clipped to [0, 1]."""
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(seed))
    return (clip + std * noise).clamp(0, 1)


def with_blinking(clip: torch.Tensor, amplitude: float) -> torch.Tensor:
    """Brightness that alternates by ``amplitude`` from frame to frame."""
    sign = torch.tensor([math.cos(math.pi * t) for t in range(len(clip))]).view(-1, 1, 1, 1)
    return (clip * 0.6 + 0.2 + amplitude * sign).clamp(0, 1).float()
