"""Ideogram 4: padding, prompt and image packed into one sequence, told apart by their positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ...layout import LatentGrid
from ..ambient import LatentTokens
from .family import Family, PatchSize
from .rasters import clips

# Where the image's positions begin, far behind any prompt's.
FIRST_POSITION = 65536


def _read(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    # (B, S, 3), the image alike in all samples: prompts are padded at their begin
    places = arguments["position_ids"]
    return LatentTokens((), places.shape[1], places[0])


def _grids_of(places: torch.Tensor) -> list[LatentGrid]:
    """From (time, row, column) of each token ``[S, 3]``: the image ends the sequence."""
    text = int((places[:, 0] < FIRST_POSITION).sum())
    return [replace(part, start=text + part.start) for part in clips(places[text:].T)]


IDEOGRAM4 = Family(
    name="Ideogram 4",
    transformers=("Ideogram4Transformer2DModel",),
    self_attention=("layers.*.attention",),
    read=_read,
    read_ids=_grids_of,
    min_tokens=6144,
    masks_pairs=True,
)
