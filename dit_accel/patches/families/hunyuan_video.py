"""HunyuanVideo and HunyuanVideo 1.5: the latents, then the prompts with their padding, which is masked."""

from __future__ import annotations

from dataclasses import replace

from .family import Family, read_video

HUNYUAN_VIDEO = Family(
    name="HunyuanVideo",
    transformers=("HunyuanVideoTransformer3DModel",),
    self_attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    read=read_video,
)
HUNYUAN_VIDEO_15 = replace(
    HUNYUAN_VIDEO,
    name="HunyuanVideo 1.5",
    transformers=("HunyuanVideo15Transformer3DModel",),
    self_attention=("transformer_blocks.*.attn",),
    masks_pairs=True,
)
