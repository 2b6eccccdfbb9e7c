"""Mochi: the latents, then the prompt without its padding, one attention call for each sample of the batch."""

from __future__ import annotations

from .family import Family, read_video

MOCHI = Family(
    name="Mochi",
    transformers=("MochiTransformer3DModel",),
    self_attention=("transformer_blocks.*.attn1",),
    read=read_video,
)
