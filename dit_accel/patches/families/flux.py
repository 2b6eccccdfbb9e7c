"""FLUX.1: the prompt, then the packed image, then reference images if there are any (Kontext)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ambient import LatentTokens
from .family import Family, PatchSize


def _read(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    # (B, N, C); no size is passed, only the position of each token
    return LatentTokens((), arguments["hidden_states"].shape[1], arguments["img_ids"])


FLUX = Family(
    name="FLUX.1",
    transformers=("FluxTransformer2DModel",),
    self_attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    read=_read,
    text_first=True,
    min_tokens=6144,
)
