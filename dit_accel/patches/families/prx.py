"""PRX and NucleusMoE: the image's tokens alone query, among keys of the prompt and the image."""

from __future__ import annotations

from .family import Family, read_image
from .qwen_image import read_shapes

PRX = Family(
    name="PRX",
    transformers=("PRXTransformer2DModel",),
    self_attention=("blocks.*.attention",),
    read=read_image,
    text_first=True,
    latents_query=True,
    min_tokens=6144,
)
NUCLEUS_MOE = Family(
    name="NucleusMoE-Image",
    transformers=("NucleusMoEImageTransformer2DModel",),
    self_attention=("transformer_blocks.*.attn",),
    read=read_shapes,
    latents_query=True,
    min_tokens=6144,
)
