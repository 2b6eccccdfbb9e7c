"""FLUX.1, FLUX.2 and their kin: the prompt, then the packed image, then reference images if there are any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ...layout import LatentGrid
from ..ambient import LatentTokens
from .family import Family, PatchSize
from .rasters import images


def _read(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    # (B, N, C); no size is passed, only the position of each token
    return LatentTokens((), arguments["hidden_states"].shape[1], arguments["img_ids"])


def grids_of_ids(img_ids: torch.Tensor) -> list[LatentGrid]:
    """From (image, row, column, ...) of each token, ``[tokens, 3 or more]`` or the same for each sample. The image with
    the smallest number is the one that is made; the others are references."""
    return images(img_ids if img_ids.ndim == 2 else img_ids[0])


FLUX = Family(
    name="FLUX.1",
    transformers=("FluxTransformer2DModel",),
    self_attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    read=_read,
    read_ids=grids_of_ids,
    text_first=True,
    min_tokens=6144,
)
# Of Klein with a cache of its references' keys, queries are fewer than keys: those calls stay dense.
FLUX2 = replace(FLUX, name="FLUX.2", transformers=("Flux2Transformer2DModel",))
