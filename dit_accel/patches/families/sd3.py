"""Stable Diffusion 3 and 3.5: the image, then the prompts; 3.5-medium also has image-only attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ambient import LatentTokens
from .family import Family, PatchSize, grid_tokens


def _read(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    _, _, height, width = arguments["hidden_states"].shape
    return grid_tokens(1, height, width, patch)


SD3 = Family(
    name="Stable Diffusion 3",
    transformers=("SD3Transformer2DModel",),
    self_attention=("transformer_blocks.*.attn", "transformer_blocks.*.attn2"),
    read=_read,
    min_tokens=6144,
)
