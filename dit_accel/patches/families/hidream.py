"""HiDream: the latents, filled up to the largest size where they are no square, then the prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ambient import LatentTokens
from .family import Family, PatchSize, read_image


def _read(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    hidden = arguments["hidden_states"]
    if hidden.ndim == 4:
        return read_image(patch, arguments)
    # (B, N, C), already in tokens, with the size in tokens of each sample
    height, width = (int(size) for size in arguments["img_sizes"][0])
    return LatentTokens((1, height, width), height * width)


HIDREAM = Family(
    name="HiDream",
    transformers=("HiDreamImageTransformer2DModel",),
    self_attention=("double_stream_blocks.*.attn1", "single_stream_blocks.*.attn1"),
    read=_read,
    timestep="timesteps",
    min_tokens=6144,
)
