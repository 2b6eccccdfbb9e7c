"""PixArt and Hunyuan-DiT: self-attention over the latents alone."""

from __future__ import annotations

from .family import Family, read_image

PIXART = Family(
    name="PixArt and Hunyuan-DiT",
    transformers=("PixArtTransformer2DModel", "HunyuanDiT2DModel"),
    self_attention=("transformer_blocks.*.attn1", "blocks.*.attn1"),
    read=read_image,
    min_tokens=6144,
)
