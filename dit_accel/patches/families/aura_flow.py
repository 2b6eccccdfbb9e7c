"""AuraFlow: learned registers and the prompt, then the latents."""

from __future__ import annotations

from .family import Family, read_image

AURA_FLOW = Family(
    name="AuraFlow",
    transformers=("AuraFlowTransformer2DModel",),
    self_attention=("joint_transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    read=read_image,
    text_first=True,
    min_tokens=6144,
)
