"""MiniMax-H3: text, conditions, sound and the video, packed into one sequence by index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ...layout import LatentGrid
from ..ambient import LatentTokens
from .family import Family, PatchSize
from .rasters import clips


def _read(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    places, rows = arguments["position_ids"], arguments["video_indices"]
    # index, time, row and column of each video token, conditions first
    ids = torch.cat([rows[:, None].to(places.dtype), places[rows]], 1)
    return LatentTokens((), places.shape[0], ids)


def _grids_of(ids: torch.Tensor) -> list[LatentGrid]:
    """From (index, time, row, column) of each video token ``[N, 4]``: the video ends the sequence."""
    ids = ids.double().cpu()
    cuts = ((ids[1:, 0] != ids[:-1, 0] + 1).nonzero()[:, 0] + 1).tolist()
    found: list[LatentGrid] = []
    for run in ids.tensor_split(cuts):
        first = int(run[0, 0])
        found = [*(replace(part, start=first + part.start) for part in clips(run[:, 1:].T)), *found]
    return found


MINIMAX_H3 = Family(
    name="MiniMax-H3",
    transformers=("MiniMaxH3Transformer3DModel",),
    self_attention=("transformer_blocks.*.attn",),
    read=_read,
    read_ids=_grids_of,
)
