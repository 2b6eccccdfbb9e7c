"""Control networks, whose blocks attend over the same latents as those of the transformer that they add to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..ambient import LatentTokens
from .cosmos import COSMOS
from .family import Family, PatchSize, read_video
from .flux import FLUX
from .pixart import PIXART
from .qwen_image import QWEN_IMAGE
from .sd3 import SD3
from .z_image import Z_IMAGE


def _read_latents(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    return read_video(patch, {"hidden_states": arguments["latents"]})


CONTROLS: tuple[Family, ...] = (
    replace(FLUX, transformers=("FluxControlNetModel",)),
    replace(SD3, transformers=("SD3ControlNetModel",)),
    replace(QWEN_IMAGE, transformers=("QwenImageControlNetModel",)),
    replace(PIXART, transformers=("HunyuanDiT2DControlNetModel",)),
    # The blocks that it shares with its transformer are that one's.
    replace(
        Z_IMAGE,
        transformers=("ZImageControlNetModel",),
        self_attention=("control_noise_refiner.*.attention", "control_layers.*.attention"),
    ),
    replace(
        COSMOS,
        transformers=("CosmosControlNetModel",),
        self_attention=("control_blocks.*.attn1",),
        read=_read_latents,
    ),
)
