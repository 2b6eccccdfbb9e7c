"""ERNIE-Image: the latents, then the prompt with its padding, which is masked."""

from __future__ import annotations

from .family import Family, read_image

ERNIE_IMAGE = Family(
    name="ERNIE-Image",
    transformers=("ErnieImageTransformer2DModel",),
    self_attention=("layers.*.self_attention",),
    read=read_image,
    min_tokens=6144,
)
