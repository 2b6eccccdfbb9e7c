"""Qwen-Image 2.1: a prompt among images to edit, whose keys are cached, and the image behind them."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from ..ambient import LatentTokens
from .family import Family, PatchSize
from .rasters import ends_of, items

TOKENS_PER_SLOT = 4  # latent tokens for each token of the prompt that stands for an image's


def _read(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    # A prompt's own parts attend by themselves, before they are cached. The image's tokens query among the keys of all.
    shapes, slots = arguments["img_shapes"][0], arguments["img_mask"][0]
    tokens = sum(prod(shape) for shape in shapes)
    length = slots.shape[0] - tokens // TOKENS_PER_SLOT + tokens
    of_images = slots.repeat_interleave(torch.where(slots, TOKENS_PER_SLOT, 1), output_size=length)
    places = (~of_images).int().argsort(stable=True)[:tokens]
    return LatentTokens((), length, ends_of(places, shapes))


QWEN_IMAGE_21 = Family(
    name="Qwen-Image 2.1",
    transformers=("QwenImage21Transformer2DModel",),
    self_attention=("transformer_blocks.*.attn",),
    read=_read,
    read_ids=items,
    text_first=True,
    latents_query=True,
    min_tokens=6144,
)
