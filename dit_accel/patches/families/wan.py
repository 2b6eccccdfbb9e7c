"""Wan 2.1 and 2.2 and what is made of them: self-attention over the latents alone."""

from __future__ import annotations

from dataclasses import replace

from .family import Family, read_frames, read_video

WAN = Family(
    name="Wan",
    transformers=(
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "WanAnimateTransformer3DModel",
        "ChronoEditTransformer3DModel",
        "SkyReelsV2Transformer3DModel",
    ),
    self_attention=("blocks.*.attn1", "vace_blocks.*.attn1"),
    read=read_video,
)
ANYFLOW = replace(WAN, name="AnyFlow", transformers=("AnyFlowTransformer3DModel",), read=read_frames)
