"""LTX-Video: self-attention over the latents alone, packed; the size or coordinates come beside them."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from ..ambient import LatentTokens
from .family import Family, PatchSize


def _read(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    # (B, F * H * W, C), already in tokens
    tokens = arguments["hidden_states"].shape[1]
    size = tuple(arguments.get(name) or 0 for name in ("num_frames", "height", "width"))
    if prod(size) == tokens:
        return LatentTokens(size, tokens)
    # LTX-Video 0.9.5 and later: a coordinate of each token instead, since condition tokens stand before the latents
    return LatentTokens((), tokens, arguments.get("video_coords"))


def _grid_of(coordinates: torch.Tensor) -> tuple[tuple[int, int, int], int]:
    """From (frame, row, column) of each token ``[B, 3, tokens]``, in any unit: the raster that ends the stream.

    Frames of condition tokens before it begin at or after the raster's first one, which is how they are told apart.
    """
    frame, row, column = coordinates[0].double().cpu()
    same_frame = (frame == frame[-1]).flip(0).long().cumprod(0)
    per_frame = int(same_frame.sum())
    width = int((same_frame * (row == row[-1]).flip(0).long().cumprod(0)).sum())
    height = per_frame // width
    tokens = frame.numel()
    if height * width != per_frame or tokens % per_frame:
        raise ValueError(f"{per_frame} tokens of a frame are no grid of rows of {width}.")
    firsts = frame.unflatten(0, (-1, per_frame))[:, 0]
    frames = 1 + int((firsts[1:] > firsts[:-1]).flip(0).long().cumprod(0).sum())
    start = tokens - frames * per_frame
    raster = [x[start:].unflatten(0, (frames, height, width)) for x in (frame, row, column)]
    for axis, values in enumerate(raster):
        along = values.movedim(axis, 0)
        if not bool((along == along[:, :1, :1]).all() and (along[1:, 0, 0] > along[:-1, 0, 0]).all()):
            raise ValueError(f"Axis {axis} of the tokens' coordinates is no raster.")
    return (frames, height, width), start


LTX = Family(
    name="LTX-Video",
    transformers=("LTXVideoTransformer3DModel",),
    self_attention=("transformer_blocks.*.attn1",),
    read=_read,
    read_ids=_grid_of,
)
