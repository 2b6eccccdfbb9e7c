"""Layers of Wan's decoder that move fewer bytes for the same numbers.

As diffusers has them, a convolution copies its input beside the frames before and then once more into a frame of
zeros, and a norm multiplies by a number, multiplies by its weights and adds 0, a pass over its input for each. These
passes are a third of the bytes that decoding moves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm
from torch import nn

FLOOR = 1e-12
"""The least norm that ``F.normalize`` divides by."""


class PaddedInside(WanCausalConv3d):
    """Pads height and width as it reads, and copies its input at most once."""

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        """Of frames ``[B, C, F, h, w]`` and those before them, zeros where there are fewer than it reads."""
        width, _, height, _, before, _ = (int(side) for side in self._padding)
        if before:
            if cache_x is None:
                x = _behind_zeros(x, before)
            else:
                known = cache_x.to(x.device)
                x = torch.cat([_behind_zeros(known, before - known.shape[2]), x], dim=2)
        return F.conv3d(x, self.weight, self.bias, self.stride, [0, height, width])


class FoldedNorm(WanRMS_norm):
    """Multiplies once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of ``[B, C, ...]``, over channels, in float32 where ``x`` has 16 bits."""
        if x.is_cuda and self.channel_first and x.stride(1) == 1:
            scaled = in_one_pass(x, self.gamma)
        else:
            wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
            unit = F.normalize(wide, dim=1 if self.channel_first else -1).to(x.dtype)
            scaled = unit * (self.scale * self.gamma)
        return scaled + self.bias if isinstance(self.bias, torch.Tensor) else scaled


def in_one_pass(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """``gamma sqrt(C) x / |x|`` of pixels whose channels are adjacent, in one launch where a GPU has four passes.

    ``rms_norm`` adds its floor to the mean square, ``normalize`` has one of the norm; both are for pixels of zeros.
    """
    weight = gamma.flatten().to(x.dtype)
    return F.rms_norm(x.movedim(1, -1), weight.shape, weight, FLOOR**2 / len(weight)).movedim(-1, 1)


def _behind_zeros(frames: torch.Tensor, count: int) -> torch.Tensor:
    # Padding keeps the order in memory (channels last), which zeros of their own would not have.
    return F.pad(frames, (0, 0, 0, 0, count, 0)) if count else frames


LEANER: dict[type[nn.Module], type[nn.Module]] = {WanCausalConv3d: PaddedInside, WanRMS_norm: FoldedNorm}
"""By diffusers' class. The class of a layer changes, not its ``forward``: that is where offloading puts its hooks."""
