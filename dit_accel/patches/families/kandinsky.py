"""Kandinsky 5 and 6: self-attention over the latents alone; sound and the attention to it stay the model's own.

Kandinsky 5 has NABLA masks of its own for videos of 10 s. Those calls stay dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
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
KANDINSKY6 = replace(
    KANDINSKY5,
    name="Kandinsky 6",
    transformers=("Kandinsky6Transformer3DModel",),
    self_attention=("visual_transformer_blocks.*.video_dec_block.self_attention",),
)
