"""Metrics on pixels and latents that need nothing but torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .measurement import MetricUnavailable
from .video import ClipPair
from .where import on_the_fastest


@dataclass(frozen=True)
class Psnr:
    """Peak signal-to-noise ratio over the whole clip: ``10 log10(1 / MSE)``, infinite if identical."""

    name: str = "psnr"
    label: str = "PSNR"
    unit: str = "dB"
    higher_is_better: bool = True
    digits: int = 2

    def __call__(self, pair: ClipPair) -> float:
        """Decibels for a clip in [0, 1]; one MSE for the clip, so frames weigh by their error."""

        def total(device: torch.device) -> float:
            # Frame by frame: a long clip in float64 fits into no cache.
            frames = zip(pair.reference, pair.candidate, strict=True)
            return sum((x.to(device).double() - y.to(device).double()).square().sum().item() for x, y in frames)

        mse = on_the_fastest(total) / pair.reference.numel()
        return math.inf if mse == 0 else -10 * math.log10(mse)


@dataclass(frozen=True)
class Ssim:
    """Structural similarity (Wang et al. 2004), mean over RGB channels, pixels and frames.

    Gaussian window of standard deviation ``sigma`` cut at ``window`` pixels, biased covariances, only where
    the window fits: as scikit-image's ``structural_similarity(..., gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=1)``.
    """

    window: int = 11
    sigma: float = 1.5
    k1: float = 0.01
    k2: float = 0.03
    name: str = "ssim"
    label: str = "SSIM"
    unit: str = ""
    higher_is_better: bool = True
    digits: int = 4

    def __call__(self, pair: ClipPair) -> float:
        """Value up to 1 (identical)."""
        _, height, width, _ = pair.reference.shape
        if min(height, width) < self.window:
            raise MetricUnavailable(
                f"SSIM needs frames of at least {self.window}x{self.window} pixels, got {height}x{width}."
            )
        offset = torch.arange(self.window, dtype=torch.float64) - self.window // 2
        taps = torch.exp(-0.5 * (offset / self.sigma) ** 2)
        taps = taps / taps.sum()

        def total(device: torch.device) -> float:
            frames = zip(pair.reference, pair.candidate, strict=True)
            return sum(self._frame(x.to(device), y.to(device), taps.float()) for x, y in frames)

        return on_the_fastest(total) / len(pair.reference)

    def _frame(self, x: torch.Tensor, y: torch.Tensor, taps: torch.Tensor) -> float:
        # Moments about the frame's mean: less cancellation in the variances, so that float32 will do.
        centre = x.mean(dim=(0, 1))
        x, y = x - centre, y - centre
        planes = torch.stack([x, y, x * x, y * y, x * y])
        mx, my, xx, yy, xy = _blur(_blur(planes, taps, 1), taps, 2)
        c1, c2 = self.k1**2, self.k2**2
        structure = (2 * (xy - mx * my) + c2) / ((xx - mx * mx) + (yy - my * my) + c2)
        mx, my = mx + centre, my + centre
        luminance = (2 * mx * my + c1) / ((mx * mx + my * my) + c1)
        return (luminance * structure).double().mean().item()


def _blur(planes: torch.Tensor, taps: torch.Tensor, dim: int) -> torch.Tensor:
    """Weighted sum of shifted views along ``dim``, only where all fit: far faster than a CPU convolution."""
    size = planes.shape[dim] - len(taps) + 1
    total = planes.narrow(dim, 0, size) * taps[0]
    for i in range(1, len(taps)):
        total.add_(planes.narrow(dim, i, size), alpha=taps[i].item())
    return total


@dataclass(frozen=True)
class LatentMse:
    """Mean squared error of the final latents, before the VAE hides or enlarges differences."""

    name: str = "latent_mse"
    label: str = "Latent MSE"
    unit: str = ""
    higher_is_better: bool = False
    digits: int = 5

    def __call__(self, pair: ClipPair) -> float:
        """Mean over all elements, in the pipeline's own (normalised) latent units, squared."""
        x, y = pair.reference_latents, pair.candidate_latents
        if x is None or y is None:
            raise MetricUnavailable("Latent MSE needs the final latents of both clips; this pipeline gave none.")
        if x.shape != y.shape:
            raise MetricUnavailable(f"Latent MSE needs latents of one shape, got {list(x.shape)} and {list(y.shape)}.")
        return (x.detach().cpu().double() - y.detach().cpu().double()).square().mean().item()
