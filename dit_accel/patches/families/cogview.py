"""CogView 3 Plus and 4, and GLM-Image: the prompt, then the latents.

GLM-Image's edits read the keys of a picture from a cache. They have fewer queries than keys then, and stay dense.
"""

from __future__ import annotations

from .family import Family, read_image

COGVIEW = Family(
    name="CogView and GLM-Image",
    transformers=("CogView4Transformer2DModel", "CogView3PlusTransformer2DModel", "GlmImageTransformer2DModel"),
    self_attention=("transformer_blocks.*.attn1",),
    read=read_image,
    text_first=True,
    min_tokens=6144,
)
