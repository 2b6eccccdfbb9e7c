"""FLUX.1 to 3 and their kin: the prompt, then the packed image, then reference images if there are any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..ambient import LatentTokens
from .family import Family, PatchSize
from .rasters import images


def _read(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    # (B, N, C); no size is passed, only the position of each token
    return LatentTokens((), arguments["hidden_states"].shape[1], arguments["img_ids"])


FLUX = Family(
    name="FLUX.1",
    transformers=("FluxTransformer2DModel",),
    self_attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    read=_read,
    read_ids=images,
    text_first=True,
    min_tokens=6144,
)


def _read_uncached(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    # Klein with a cache attends from its references to themselves, and from all else to more keys than queries.
    latents = _read(patch, arguments)
    return latents if arguments.get("kv_cache_mode") is None else LatentTokens((), latents.tokens)


FLUX2 = replace(FLUX, name="FLUX.2", transformers=("Flux2Transformer2DModel",), read=_read_uncached)


def _read_apart(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    # reference images come as a stream of their own
    latents = _read(patch, arguments)
    references = arguments.get("image_cond_hidden_states")
    return latents if references is None else latents._replace(tokens=latents.tokens + references.shape[1])


FLUX3 = replace(
    FLUX,
    name="FLUX.3",
    transformers=("Flux3Transformer2DModel",),
    self_attention=("mode_blocks.image.*.attn", "single_transformer_blocks.*.attn"),
    read=_read_apart,
)
# Chroma's mask of a padded prompt is added to the scores, as ones and zeros: such calls stay dense.
CHROMA = replace(FLUX, name="Chroma", transformers=("ChromaTransformer2DModel",), masks_pairs=True)
BRIA = replace(FLUX, name="Bria and FIBO", transformers=("BriaTransformer2DModel", "BriaFiboTransformer2DModel"))
OVIS_IMAGE = replace(FLUX, name="Ovis-Image", transformers=("OvisImageTransformer2DModel",))
LONGCAT_IMAGE = replace(FLUX, name="LongCat-Image", transformers=("LongCatImageTransformer2DModel",))
