"""LTX-2: self-attention over the packed video latents, condition and in-context tokens behind them.

The audio stream, a few hundred tokens, and the attention between the streams stay the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from ...layout import LatentGrid
from ..ambient import LatentTokens
from .family import Family, PatchSize, grid_tokens


def _read(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    # (B, F * H * W + conditions, C), already in tokens; the size is of the latents alone
    tokens = arguments["hidden_states"].shape[1]
    size = [arguments.get(name) or 0 for name in ("num_frames", "height", "width")]
    if all(size) and prod(size) // prod(patch) <= tokens:
        return LatentTokens(grid_tokens(size[0], size[1], size[2], patch).grid, tokens)
    return LatentTokens((), tokens, arguments.get("video_coords"))


def _grid_of(coordinates: torch.Tensor) -> list[LatentGrid]:
    """From where each token begins and ends in (frame, row, column), ``[B, 3, tokens, 2]``: the raster that comes
    first, whose frames follow one another without a gap. A condition begins elsewhere."""
    begin, end = coordinates[0].double().cpu().unbind(-1)

    def run(axis: int) -> int:
        """How many tokens at the beginning share their place on an axis."""
        return int((begin[axis] == begin[axis, 0]).long().cumprod(0).sum())

    per_frame, width = run(0), min(run(0), run(1))
    if per_frame % width:
        raise ValueError(f"{per_frame} tokens of a frame are no grid of rows of {width}.")
    whole = begin.shape[1] // per_frame * per_frame
    first, last = begin[0, :whole:per_frame], end[0, :whole:per_frame]
    frames = 1 + int((first[1:] == last[:-1]).long().cumprod(0).sum())
    inside = begin[:, : frames * per_frame].unflatten(1, (frames, per_frame // width, width))
    for axis, values in enumerate(inside):
        along = values.movedim(axis, 0)
        if not bool((along == along[:, :1, :1]).all() and (along[1:, 0, 0] > along[:-1, 0, 0]).all()):
            raise ValueError(f"Axis {axis} of the tokens' coordinates is no raster.")
    return [LatentGrid((frames, per_frame // width, width), 0)]


LTX2 = Family(
    name="LTX-2",
    transformers=("LTX2VideoTransformer3DModel",),
    self_attention=("transformer_blocks.*.attn1",),
    read=_read,
    read_ids=_grid_of,
)
