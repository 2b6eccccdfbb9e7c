"""Krea 2: the prompt, then the packed image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ambient import LatentTokens
from .family import Family, PatchSize
from .rasters import images


def _read(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    # (B, N, C); the positions are of the prompt's tokens too
    tokens = arguments["hidden_states"].shape[1]
    return LatentTokens((), tokens, arguments["position_ids"][-tokens:])


KREA2 = Family(
    name="Krea 2",
    transformers=("Krea2Transformer2DModel",),
    self_attention=("transformer_blocks.*.attn",),
    read=_read,
    read_ids=images,
    text_first=True,
    min_tokens=6144,
)
