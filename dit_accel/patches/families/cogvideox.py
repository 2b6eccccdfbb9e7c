"""CogVideoX and ConsisID: the prompt, then the latents."""

from __future__ import annotations

from .family import Family, read_frames

COGVIDEOX = Family(
    name="CogVideoX",
    transformers=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
    self_attention=("transformer_blocks.*.attn1",),
    read=read_frames,
    text_first=True,
)
