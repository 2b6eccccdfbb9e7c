"""FLUX.1: the prompt, then the packed image, then reference images if there are any (Kontext)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..ambient import LatentTokens
from .family import Family, PatchSize


def _read(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    # (B, N, C); no size is passed, only the position of each token
    return LatentTokens((), arguments["hidden_states"].shape[1], arguments["img_ids"])


def _grid_of(img_ids: torch.Tensor) -> tuple[tuple[int, int, int], int]:
    """From (reference, row, column) of each token; references carry another first number and come behind."""
    ids = img_ids.reshape(-1, img_ids.shape[-1]).round().long().cpu()
    target = ids[ids[:, 0] == ids[0, 0]]
    height, width = (int(target[:, axis].max() - target[:, axis].min()) + 1 for axis in (1, 2))
    if height * width != len(target):
        raise ValueError(f"{len(target)} image tokens are no grid of {height} x {width}.")
    return (1, height, width), 0


FLUX = Family(
    name="FLUX.1",
    transformers=("FluxTransformer2DModel",),
    self_attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    read=_read,
    read_ids=_grid_of,
    text_first=True,
    min_tokens=6144,
)
