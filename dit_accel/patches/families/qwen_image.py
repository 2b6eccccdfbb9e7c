"""Qwen-Image: the prompt, then the packed image, then reference images if there are any (edit)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ambient import LatentTokens
from .family import Family, PatchSize


def _read(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    # (B, N, C); shapes in tokens: one tuple a sample, or a list of tuples, target first
    shapes = arguments.get("img_shapes")
    first = shapes[0] if shapes else ()
    if first and isinstance(first[0], (tuple, list)):
        first = first[0]
    return LatentTokens(tuple(first), arguments["hidden_states"].shape[1])


QWEN_IMAGE = Family(
    name="Qwen-Image",
    transformers=("QwenImageTransformer2DModel",),
    self_attention=("transformer_blocks.*.attn",),
    read=_read,
    text_first=True,
    min_tokens=6144,
)
