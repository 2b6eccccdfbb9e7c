"""Helios: the video's past, the farther the coarser, then the latents of the chunk that is made."""

from __future__ import annotations

from .family import Family, read_video

HELIOS = Family(
    name="Helios",
    transformers=("HeliosTransformer3DModel",),
    self_attention=("blocks.*.attn1",),
    read=read_video,
    text_first=True,  # the past takes the prompt's place
)
