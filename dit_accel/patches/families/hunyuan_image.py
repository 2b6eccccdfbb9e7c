"""HunyuanImage 2.1 and its refiner: the latents, then the prompts with their padding, which is masked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ambient import LatentTokens
from .family import Family, PatchSize, read_image, read_video


def _read(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    # (B, C, H, W), the refiner's (B, C, F, H, W)
    return (read_image if arguments["hidden_states"].ndim == 4 else read_video)(patch, arguments)


HUNYUAN_IMAGE = Family(
    name="HunyuanImage",
    transformers=("HunyuanImageTransformer2DModel",),
    self_attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    read=_read,
    min_tokens=6144,
)
