"""EasyAnimate: the prompt, then the latents."""

from __future__ import annotations

from .family import Family, read_video

EASYANIMATE = Family(
    name="EasyAnimate",
    transformers=("EasyAnimateTransformer3DModel",),
    self_attention=("transformer_blocks.*.attn1",),
    read=read_video,
    text_first=True,
)
