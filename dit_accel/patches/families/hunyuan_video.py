"""HunyuanVideo and its kin: the latents, then the prompts with their padding, which is masked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from typing import Any

from ..ambient import LatentTokens
from .family import Family, PatchSize, read_video

HUNYUAN_VIDEO = Family(
    name="HunyuanVideo",
    transformers=("HunyuanVideoTransformer3DModel",),
    self_attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    read=read_video,
)
HUNYUAN_VIDEO_15 = replace(
    HUNYUAN_VIDEO,
    name="HunyuanVideo 1.5",
    transformers=("HunyuanVideo15Transformer3DModel",),
    self_attention=("transformer_blocks.*.attn",),
    masks_pairs=True,
)
# Its last blocks, the decoder, read the latents of the blocks before where others have the prompt.
MOTIF_VIDEO = replace(HUNYUAN_VIDEO, name="Motif-Video", transformers=("MotifVideoTransformer3DModel",))

# Latent frames, rows and columns of a token of history, the nearest first.
_HISTORY = {"latents_clean": (1, 2, 2), "latents_history_2x": (2, 4, 4), "latents_history_4x": (4, 8, 8)}


def _read_packed(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    """The video's past, the farther the coarser, lies before the latents."""
    latents = read_video(patch, arguments)
    start = 0
    for name, size in _HISTORY.items():
        past = arguments.get(name)
        if past is not None and arguments.get(f"indices_{name}") is not None:
            frames, height, width = (ceil(length / step) for length, step in zip(past.shape[2:], size, strict=True))
            start += frames * height * width
    return LatentTokens(latents.grid, start + latents.tokens, None, start)


FRAMEPACK = replace(
    HUNYUAN_VIDEO,
    name="FramePack",
    transformers=("HunyuanVideoFramepackTransformer3DModel",),
    read=_read_packed,
)
