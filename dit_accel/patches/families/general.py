"""A transformer that nobody has declared, as far as its layout can be read off a call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

import torch
from torch import nn

from ..ambient import LatentTokens
from ..seam import seam_symbol
from .family import Family, PatchSize, grid_tokens
from .rasters import images

EXAMPLE = """
from dit_accel import Family, register_family
from dit_accel.patches.families.family import read_video    # latents (B, C, F, H, W)

register_family(
    Family(
        name="Mine",
        transformers=("MyTransformer3DModel",),
        self_attention=("blocks.*.attn1",),    # modules whose attention mixes latents
        read=read_video,
        text_first=False,    # whether other tokens come before the latents in the sequence
    )
)"""
_SIZES = ("num_frames", "height", "width")
_POSITIONS = ("img_ids", "image_ids", "position_ids")


def general_family(model: nn.Module) -> Family:
    """A family for a model of an unknown class.

    Its self-attentions are the modules with an attention processor that can be diverted. Its latents are read off
    ``hidden_states``: their shape, where that has rows and columns, else the size or the positions beside them. A call
    is sparse where its sequence holds the latents and nothing else; every other stays dense, with a reason.

    Raises:
        ValueError: there is no such module, or ``forward`` takes no ``hidden_states``; says what was looked for.
    """
    kind = type(model).__name__
    if "hidden_states" not in inspect.signature(type(model).forward).parameters:
        raise ValueError(f"{kind} is of no known family, and its forward takes no hidden_states to read latents off.")
    paths = tuple(path for path, module in model.named_modules() if _can_be_diverted(module))
    if not paths:
        raise ValueError(
            f"{kind} is of no known family, and none of its modules has an attention processor that calls "
            "dispatch_attention_fn or F.scaled_dot_product_attention."
        )
    channels = dict(getattr(model, "config", {})).get("in_channels")
    return Family(
        name=f"unknown ({kind})",
        transformers=(kind,),
        self_attention=paths,
        read=partial(_read, channels),
        read_ids=images,
        alone=True,
    )


def _can_be_diverted(module: nn.Module) -> bool:
    processor = getattr(module, "processor", None)
    try:
        return processor is not None and bool(seam_symbol(processor))
    except (ValueError, KeyError):
        return False


def _read(channels: int | None, patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    latents = arguments["hidden_states"]
    shape = tuple(latents.shape) if isinstance(latents, torch.Tensor) else ()
    if len(shape) == 5 and channels in shape[1:3] and shape[1] != shape[2]:
        frames = shape[2] if shape[1] == channels else shape[1]
        return grid_tokens(frames, shape[3], shape[4], patch)
    if len(shape) == 4 and shape[1] == channels:
        return grid_tokens(1, shape[2], shape[3], patch)
    if len(shape) == 3:
        size = tuple(arguments.get(name) or 0 for name in _SIZES)
        if prod(size) == shape[1]:
            return LatentTokens(size, shape[1])
        for name in _POSITIONS:
            if _are_positions(arguments.get(name), shape[1]):
                return LatentTokens((), shape[1], arguments[name])
    return LatentTokens((), 1)


def _are_positions(value: Any, tokens: int) -> bool:
    """Whether a value may be (image, row, column, ...) of each token."""
    return (
        isinstance(value, torch.Tensor) and value.ndim in (2, 3) and value.shape[-2] == tokens and value.shape[-1] > 2
    )
