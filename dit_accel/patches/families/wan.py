"""Wan 2.1 and 2.2, text and image to video, VACE: self-attention over the latents alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ambient import LatentTokens
from .family import Family, PatchSize, grid_tokens


def _read(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    _, _, frames, height, width = arguments["hidden_states"].shape
    return grid_tokens(frames, height, width, patch)


WAN = Family(
    name="Wan",
    transformers=("WanTransformer3DModel", "WanVACETransformer3DModel"),
    self_attention=("blocks.*.attn1", "vace_blocks.*.attn1"),
    read=_read,
)
