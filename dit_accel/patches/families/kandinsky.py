"""Kandinsky 5: self-attention over the latents alone. Its own NABLA masks, of videos of 10 s, stay dense here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ambient import LatentTokens
from .family import Family, PatchSize, grid_tokens


def _read(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    # (B, F, H, W, C)
    _, frames, height, width, _ = arguments["hidden_states"].shape
    return grid_tokens(frames, height, width, patch)


KANDINSKY5 = Family(
    name="Kandinsky 5",
    transformers=("Kandinsky5Transformer3DModel",),
    self_attention=("visual_transformer_blocks.*.self_attention",),
    read=_read,
)
