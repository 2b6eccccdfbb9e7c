"""FLUX.1, FLUX.2 and their kin: the prompt, then the packed image, then reference images if there are any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..ambient import LatentTokens
from .family import Family, PatchSize


def _read(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    # (B, N, C); no size is passed, only the position of each token
    return LatentTokens((), arguments["hidden_states"].shape[1], arguments["img_ids"])


def grid_of_ids(img_ids: torch.Tensor) -> tuple[tuple[int, int, int], int]:
    """From (image, row, column, ...) of each token, ``[tokens, 3 or more]`` or the same for each sample: the image with
    the smallest number, which is the one that is made."""
    ids = (img_ids if img_ids.ndim == 2 else img_ids[0]).round().long().cpu()
    places = (ids[:, 0] == ids[:, 0].min()).nonzero().flatten()
    target = ids[places]
    height, width = (int(target[:, axis].max() - target[:, axis].min()) + 1 for axis in (1, 2))
    start = int(places[0])
    if height * width != len(target) or int(places[-1]) - start + 1 != len(target):
        raise ValueError(f"{len(target)} image tokens are no grid of {height} x {width}.")
    return (1, height, width), start


FLUX = Family(
    name="FLUX.1",
    transformers=("FluxTransformer2DModel",),
    self_attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    read=_read,
    read_ids=grid_of_ids,
    text_first=True,
    min_tokens=6144,
)
# Of Klein with a cache of its references' keys, queries are fewer than keys: those calls stay dense.
FLUX2 = replace(FLUX, name="FLUX.2", transformers=("Flux2Transformer2DModel",))
