"""OmniGen: prompt and images to edit in one sequence, which attends causally to the prompt, then a time token and the
image, which sees all. References lie within the prompt and are read in full."""

from __future__ import annotations

from .family import Family, read_image

OMNIGEN = Family(
    name="OmniGen",
    transformers=("OmniGenTransformer2DModel",),
    self_attention=("layers.*.self_attn",),
    read=read_image,
    text_first=True,
    min_tokens=6144,
    adds_pairs=True,
)
