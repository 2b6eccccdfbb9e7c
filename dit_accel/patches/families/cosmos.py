"""Cosmos 1, 2 and 2.5, and Anima: self-attention over the latents alone."""

from __future__ import annotations

from .family import Family, read_video

COSMOS = Family(
    name="Cosmos",
    transformers=("CosmosTransformer3DModel",),
    self_attention=("transformer_blocks.*.attn1",),
    read=read_video,
)
