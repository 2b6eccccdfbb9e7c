"""PSNR, SSIM, latent MSE and clip validation against known values."""

import math

import numpy as np
import pytest
import torch

from dit_accel.quality import ClipPair, MetricUnavailable, as_video
from dit_accel.quality.pixel import LatentMse, Psnr, Ssim
from tests.quality.clips import moving_clip, with_noise


@pytest.mark.parametrize("step", [1 / 255, 0.01, 0.25])
def test_psnr_of_constant_error_is_exact(step: float) -> None:
    reference = torch.full((3, 16, 20, 3), 0.5)
    value = Psnr()(ClipPair(reference, reference + step))
    assert value == pytest.approx(-20 * math.log10(step), abs=1e-4)


def test_psnr_of_known_noise() -> None:
    std, shape = 0.02, (4, 64, 64, 3)
    noise = std * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    value = Psnr()(ClipPair(torch.full(shape, 0.5), 0.5 + noise))
    # MSE of n Gaussian samples scatters by sqrt(2 / n): four standard deviations, in dB.
    slack = 4 * 10 / math.log(10) * math.sqrt(2 / noise.numel())
    assert value == pytest.approx(-20 * math.log10(std), abs=slack)


def test_psnr_weighs_frames_by_their_error() -> None:
    reference = torch.zeros(2, 16, 16, 3)
    candidate = reference.clone()
    candidate[1] = 0.2
    assert Psnr()(ClipPair(reference, candidate)) == pytest.approx(-10 * math.log10(0.04 / 2), abs=1e-4)


def test_identical_clips() -> None:
    clip = moving_clip()
    pair = ClipPair(clip, clip.clone())
    assert Psnr()(pair) == math.inf
    assert Ssim()(pair) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(
    "reference",
    [
        moving_clip(3, 72, 96),
        moving_clip(2, 11, 11),
        moving_clip(2, 37, 53),
        torch.full((2, 48, 64, 3), 0.98),
    ],
    ids=["72x96", "11x11", "37x53", "flat"],
)
@pytest.mark.parametrize("std", [0.001, 0.01, 0.1, 0.4])
def test_ssim_agrees_with_scikit_image(reference: torch.Tensor, std: float) -> None:
    skimage = pytest.importorskip("skimage.metrics")
    candidate = with_noise(reference, std)
    expected = np.mean(
        [
            skimage.structural_similarity(
                x.double().numpy(),
                y.double().numpy(),
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                data_range=1.0,
                channel_axis=-1,
            )
            for x, y in zip(reference, candidate)
        ]
    )
    assert Ssim()(ClipPair(reference, candidate)) == pytest.approx(expected, abs=1e-6)


def test_ssim_of_tiny_frames_gives_a_reason() -> None:
    clip = torch.zeros(2, 10, 40, 3)
    with pytest.raises(MetricUnavailable, match="at least 11x11 pixels, got 10x40"):
        Ssim()(ClipPair(clip, clip))


def test_latent_mse() -> None:
    clip, latents = torch.zeros(1, 16, 16, 3), torch.randn(1, 4, 2, 3, 5)
    pair = ClipPair(clip, clip, reference_latents=latents, candidate_latents=latents + 0.5)
    assert LatentMse()(pair) == pytest.approx(0.25, rel=1e-5)
    with pytest.raises(MetricUnavailable, match="final latents"):
        LatentMse()(ClipPair(clip, clip))


def test_uint8_and_numpy_clips_are_the_same_clip() -> None:
    levels = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(as_video(levels), levels.float() / 255)
    assert torch.equal(as_video(levels.numpy()), as_video(levels))
    assert torch.equal(as_video((levels.double() / 255).numpy()), as_video(levels))


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (torch.zeros(4, 3, 16, 16), r"\[frames, height, width, 3\].*\[4, 3, 16, 16\]"),
        (torch.zeros(16, 16, 3), r"got \[16, 16, 3\]"),
        (torch.zeros(0, 16, 16, 3), r"got \[0, 16, 16, 3\]"),
        (torch.zeros(1, 4, 4, 3, dtype=torch.int32), r"torch.int32"),
        (torch.full((1, 4, 4, 3), -1.0), r"\[0, 1\], got values from -1"),
        (torch.full((1, 4, 4, 3), math.nan), r"\[0, 1\]"),
    ],
)
def test_bad_clips_are_refused(clip: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_video(clip)


def test_unpaired_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one shape, got \[2, 8, 8, 3\] and \[3, 8, 8, 3\]"):
        ClipPair(torch.zeros(2, 8, 8, 3), torch.zeros(3, 8, 8, 3))
