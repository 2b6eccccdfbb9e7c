"""Qwen-Image: the prompt, then the packed image, then reference images if there are any (edit)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from math import prod
from typing import Any

from ..ambient import LatentTokens
from .family import Family, PatchSize


def read_shapes(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    """The image and its references, from their shapes."""
    # (B, N, C); shapes in tokens: one tuple a sample, or a list of tuples, target first
    shapes = arguments.get("img_shapes")
    tokens, first = arguments["hidden_states"].shape[1], shapes[0] if shapes else ()
    if not first or not isinstance(first[0], (tuple, list)):
        return LatentTokens(tuple(first), tokens)
    generated, *others = (tuple(shape) for shape in first)
    starts = accumulate(prod(shape) for shape in first[:-1])
    return LatentTokens(generated, tokens, references=tuple((*s, at) for s, at in zip(others, starts, strict=True)))


QWEN_IMAGE = Family(
    name="Qwen-Image",
    transformers=("QwenImageTransformer2DModel",),
    self_attention=("transformer_blocks.*.attn",),
    read=read_shapes,
    text_first=True,
    min_tokens=6144,
)
