"""FIBO 2: the gist of the prompt, then the latents and the images that they are made from.

Prompts whose gists differ in length come behind instead, with a mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ambient import LatentTokens
from .family import Family, PatchSize, read_image


def _read(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    latents = read_image(patch, arguments)
    area = patch[1] * patch[2]
    context = sum(image.shape[2] * image.shape[3] // area for image in arguments.get("context_latents") or ())
    return LatentTokens(latents.grid, latents.tokens + context)


BRIA_FIBO2 = Family(
    name="FIBO 2",
    transformers=("BriaFibo2Transformer2DModel",),
    self_attention=("noise_refiner.*.attention", "layers.*.attention"),
    read=_read,
    text_first=True,
    masked="first",
    min_tokens=6144,
)
