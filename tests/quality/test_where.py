"""Metrics on a GPU: the CPU's numbers, and the CPU where its memory is full."""

import pytest
import torch

from dit_accel.quality import where
from dit_accel.quality.lpips import AlexNetLpips
from dit_accel.quality.pixel import Ssim
from dit_accel.quality.video import ClipPair


def pair() -> ClipPair:
    torch.manual_seed(0)
    reference = torch.rand(3, 64, 96, 3)
    return ClipPair(reference, (reference + 0.02 * torch.randn_like(reference)).clamp(0, 1))


def network() -> AlexNetLpips:
    torch.manual_seed(1)
    channels, sizes = (3, 64, 192, 384, 256, 256), (11, 5, 3, 3, 3)
    kernels = [
        torch.randn(out, into, size, size) / (into * size * size) ** 0.5
        for into, out, size in zip(channels, channels[1:], sizes, strict=False)
    ]
    return AlexNetLpips(
        tuple(kernels), tuple(torch.randn(out) for out in channels[1:]), tuple(torch.rand(out) for out in channels[1:])
    )


def test_a_full_gpu_leaves_it_to_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    asked = []

    def compute(device: torch.device) -> str:
        asked.append(device.type)
        if device.type == "cuda":
            raise torch.OutOfMemoryError("full")
        return "found"

    assert where.on_the_fastest(compute) == "found"
    assert asked == ["cuda", "cpu"]


@pytest.mark.gpu
def test_a_gpu_finds_what_the_cpu_finds(monkeypatch):
    clips, images = pair(), torch.rand(2, 2, 3, 64, 96)
    ssim, distance = Ssim()(clips), where.on_the_fastest(lambda d: network().to(d).distance(*images.to(d)).cpu())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Ssim()(clips) == pytest.approx(ssim, abs=1e-5)
    torch.testing.assert_close(network().distance(*images), distance, rtol=1e-4, atol=0)
