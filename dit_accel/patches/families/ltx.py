"""LTX-Video: self-attention over the latents alone, packed; the size comes beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ambient import LatentTokens
from .family import Family, PatchSize


def _read(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    # (B, F * H * W, C), already in tokens
    count = arguments["hidden_states"].shape[1]
    size = [arguments.get(name) for name in ("num_frames", "height", "width")]
    return LatentTokens(() if None in size else tuple(size), count)


LTX = Family(
    name="LTX-Video",
    transformers=("LTXVideoTransformer3DModel",),
    self_attention=("transformer_blocks.*.attn1",),
    read=_read,
)
