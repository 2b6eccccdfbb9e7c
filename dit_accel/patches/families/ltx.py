"""LTX-Video: self-attention over the latents alone, packed; the size comes beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ambient import LatentTokens
from .family import Family, PatchSize


def _read(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    # (B, F * H * W, C), already in tokens
    tokens = arguments["hidden_states"].shape[1]
    size = tuple(arguments.get(name) or 0 for name in ("num_frames", "height", "width"))
    return LatentTokens(size if all(size) else (), tokens)


LTX = Family(
    name="LTX-Video",
    transformers=("LTXVideoTransformer3DModel",),
    self_attention=("transformer_blocks.*.attn1",),
    read=_read,
)
