"""Allegro: self-attention over the latents alone."""

from __future__ import annotations

from .family import Family, read_video

ALLEGRO = Family(
    name="Allegro",
    transformers=("AllegroTransformer3DModel",),
    self_attention=("transformer_blocks.*.attn1",),
    read=read_video,
)
