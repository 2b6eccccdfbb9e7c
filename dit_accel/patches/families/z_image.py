"""Z-Image: the latents, filled up to a multiple of 32 tokens, then the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..ambient import LatentTokens
from .family import Family, PatchSize, grid_tokens


def _read(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    # a list of (C, F, H, W), one a sample; the model may have several patch sizes
    samples = arguments["x"]
    first = samples[0]
    if not isinstance(first, torch.Tensor) or any(sample.shape != first.shape for sample in samples):
        # Z-Image-Omni's prompts lie between its images, and samples of two sizes have two grids.
        return LatentTokens((), 1)
    frames, height, width = first.shape[1:]
    rows = arguments.get("patch_size", 2)
    return grid_tokens(frames, height, width, (arguments.get("f_patch_size", 1), rows, rows))


Z_IMAGE = Family(
    name="Z-Image",
    transformers=("ZImageTransformer2DModel",),
    self_attention=("noise_refiner.*.attention", "layers.*.attention"),
    read=_read,
    timestep="t",
    min_tokens=6144,
)
