"""Lumina 2: the prompt without its padding, then the latents."""

from __future__ import annotations

from .family import Family, read_image

LUMINA2 = Family(
    name="Lumina 2",
    transformers=("Lumina2Transformer2DModel",),
    self_attention=("noise_refiner.*.attn", "layers.*.attn"),
    read=read_image,
    text_first=True,
    masked="apart",
    min_tokens=6144,
)
