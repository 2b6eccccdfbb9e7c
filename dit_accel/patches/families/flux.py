"""FLUX.1: the prompt, then the packed image, then reference images if there are any (Kontext)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...layout import LatentGrid
from ..ambient import LatentTokens
from .family import Family, PatchSize
from .rasters import images


def _read(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    # (B, N, C); no size is passed, only the position of each token
    return LatentTokens((), arguments["hidden_states"].shape[1], arguments["img_ids"])


def _grids_of(img_ids: torch.Tensor) -> list[LatentGrid]:
    """From (reference, row, column) of each token; references come behind and carry another first number."""
    return images(img_ids.reshape(-1, img_ids.shape[-1]))


FLUX = Family(
    name="FLUX.1",
    transformers=("FluxTransformer2DModel",),
    self_attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    read=_read,
    read_ids=_grids_of,
    text_first=True,
    min_tokens=6144,
)
