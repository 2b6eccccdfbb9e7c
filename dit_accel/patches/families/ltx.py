"""LTX-Video: self-attention over the latents alone, packed; the size or coordinates come beside them."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from ...layout import LatentGrid
from ..ambient import LatentTokens
from .family import Family, PatchSize
from .rasters import clips


def _read(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    # (B, F * H * W, C), already in tokens
    tokens = arguments["hidden_states"].shape[1]
    size = tuple(arguments.get(name) or 0 for name in ("num_frames", "height", "width"))
    if prod(size) == tokens:
        return LatentTokens(size, tokens)
    # LTX-Video 0.9.5 and later: a coordinate of each token instead, since condition tokens stand before the latents
    return LatentTokens((), tokens, arguments.get("video_coords"))


def _grids_of(coordinates: torch.Tensor) -> list[LatentGrid]:
    """From (frame, row, column) of each token ``[B, 3, N]``; condition tokens come before."""
    return clips(coordinates[0])


LTX = Family(
    name="LTX-Video",
    transformers=("LTXVideoTransformer3DModel",),
    self_attention=("transformer_blocks.*.attn1",),
    read=_read,
    read_ids=_grids_of,
)
