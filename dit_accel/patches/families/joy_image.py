"""JoyImage: the image that is made, then those it is made from, then the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..ambient import LatentTokens
from .family import Family, PatchSize, grid_tokens, read_video


def _read(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    hidden = arguments["hidden_states"]
    if hidden.ndim == 5:
        return read_video(patch, arguments)
    # (B, images, C, F, H, W): all of one size, each a frame of one grid
    _, images, _, frames, height, width = hidden.shape
    return grid_tokens(images * frames, height, width, patch)


def _read_shapes(_: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    # (B, patches, C, ...), filled up to the longest sample; sizes in tokens of each sample's images
    sizes = [shapes[0] for shapes in arguments["shape_list"]]
    alike = all(tuple(size) == tuple(sizes[0]) for size in sizes)
    return LatentTokens(tuple(sizes[0]) if alike else (), arguments["hidden_states"].shape[1])


JOY_IMAGE = Family(
    name="JoyImage Edit",
    transformers=("JoyImageEditTransformer3DModel",),
    self_attention=("double_blocks.*.attn",),
    read=_read,
    min_tokens=6144,
)
JOY_IMAGE_PLUS = replace(
    JOY_IMAGE,
    name="JoyImage Edit Plus",
    transformers=("JoyImageEditPlusTransformer3DModel",),
    read=_read_shapes,
)
