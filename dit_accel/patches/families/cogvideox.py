"""CogVideoX: the prompt, then the latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ambient import LatentTokens
from .family import Family, PatchSize, grid_tokens


def _read(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    # (B, F, C, H, W): frames before channels
    _, frames, _, height, width = arguments["hidden_states"].shape
    return grid_tokens(frames, height, width, patch)


COGVIDEOX = Family(
    name="CogVideoX",
    transformers=("CogVideoXTransformer3DModel",),
    self_attention=("transformer_blocks.*.attn1",),
    read=_read,
    text_first=True,
)
