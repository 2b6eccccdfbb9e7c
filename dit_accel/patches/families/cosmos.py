"""Cosmos 1 to 3, and Anima."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ambient import LatentTokens
from .family import Family, PatchSize, read_video
from .rasters import ends_of, items


def _read_packed(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    # The prompt, controls, and the video; sound and actions behind it. The prompt attends by itself, causally, and all
    # others query among the keys of all.
    ends = ends_of(arguments["vision_sequence_indexes"], arguments["vision_token_shapes"])
    return LatentTokens((), arguments["sequence_length"], ends)


# Self-attention over the latents alone.
COSMOS = Family(
    name="Cosmos",
    transformers=("CosmosTransformer3DModel",),
    self_attention=("transformer_blocks.*.attn1",),
    read=read_video,
)
COSMOS3 = Family(
    name="Cosmos 3",
    transformers=("Cosmos3OmniTransformer",),
    self_attention=("layers.*.self_attn",),
    read=_read_packed,
    read_ids=items,
    text_first=True,
    latents_query=True,
    timestep="vision_timesteps",
)
