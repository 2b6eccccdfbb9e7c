"""Stable Diffusion 3 and 3.5: the image, then the prompts; 3.5-medium also has image-only attention."""

from __future__ import annotations

from .family import Family, read_image

SD3 = Family(
    name="Stable Diffusion 3",
    transformers=("SD3Transformer2DModel",),
    self_attention=("transformer_blocks.*.attn", "transformer_blocks.*.attn2"),
    read=read_image,
    min_tokens=6144,
)
