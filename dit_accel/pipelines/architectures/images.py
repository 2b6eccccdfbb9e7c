"""Image models: sizes and sources of their configs, and what their pipelines pass.

Sizes of one to eight thousand pixels a side are asked for by their width and height; the default is the model's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .architecture import TIMESTEP, Architecture, Latents

# What a prompt of some forty words comes to.
PROMPT_TOKENS = 64


def _image_ids(latents: Latents, number: float) -> torch.Tensor:
    """(image, row, column) of each token ``[N, 3]``; two latents by two make a token."""
    height, width = latents.height // 2, latents.width // 2
    ids = torch.full((height, width, 3), number, dtype=latents.dtype, device=latents.device)
    ids[..., 1] = torch.arange(height, device=latents.device)[:, None]
    ids[..., 2] = torch.arange(width, device=latents.device)
    return ids.view(-1, 3)


def _flux(_model: nn.Module, latents: Latents, references: int = 0) -> dict[str, Any]:
    ids = torch.cat([_image_ids(latents, float(number)) for number in range(1 + references)])
    return {
        "hidden_states": latents.noise(len(ids), 64),
        "encoder_hidden_states": latents.noise(512, 4096),
        "pooled_projections": latents.noise(768),
        "timestep": latents.full(TIMESTEP / 1000),
        "img_ids": ids,
        "txt_ids": torch.zeros(512, 3, dtype=latents.dtype, device=latents.device),
        "guidance": latents.full(3.5, torch.float32),
    }


def _flux_kontext(model: nn.Module, latents: Latents) -> dict[str, Any]:
    # The image to edit lies behind the one that is made, and has its size.
    return _flux(model, latents, references=1)


def _qwen_image(model: nn.Module, latents: Latents) -> dict[str, Any]:
    config: Any = model.config
    height, width = latents.height // 2, latents.width // 2
    return {
        "hidden_states": latents.noise(height * width, config.in_channels),
        "encoder_hidden_states": latents.noise(PROMPT_TOKENS, config.joint_attention_dim),
        # The pipeline passes no mask of a prompt that is not padded.
        "encoder_hidden_states_mask": None,
        "timestep": latents.full(TIMESTEP / 1000),
        "img_shapes": [[(1, height, width)]] * latents.batch,
    }


def _z_image(model: nn.Module, latents: Latents) -> dict[str, Any]:
    config: Any = model.config
    # One tensor a sample.
    return {
        "x": list(latents.noise(config.in_channels, 1, latents.height, latents.width)),
        "t": latents.full(1 - TIMESTEP / 1000),
        "cap_feats": list(latents.noise(PROMPT_TOKENS, config.cap_feat_dim)),
    }


# The model card of black-forest-labs/FLUX.1-dev: 12 billion parameters; FLUX.1-Kontext-dev has the same transformer.
_FLUX = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}

IMAGE_ARCHITECTURES = (
    Architecture(
        name="flux-dev",
        transformer="FluxTransformer2DModel",
        config=_FLUX,
        depth=("num_layers", "num_single_layers"),
        inputs=_flux,
        size=(1024, 1024, 1),
        is_video=False,
    ),
    Architecture(
        name="flux-kontext",
        transformer="FluxTransformer2DModel",
        config=_FLUX,
        depth=("num_layers", "num_single_layers"),
        inputs=_flux_kontext,
        size=(1024, 1024, 1),
        is_video=False,
        references=1,
    ),
    # diffusers' defaults, which the checkpoint Qwen/Qwen-Image has; its report (arXiv 2508.02324) says 20 billion.
    Architecture(
        name="qwen-image",
        transformer="QwenImageTransformer2DModel",
        config={
            "patch_size": 2,
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 60,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 3584,
            "guidance_embeds": False,
            "axes_dims_rope": (16, 56, 56),
        },
        depth=("num_layers",),
        inputs=_qwen_image,
        size=(1328, 1328, 1),
        is_video=False,
    ),
    # diffusers' defaults, which Tongyi-MAI/Z-Image-Turbo has; its card says 6 billion.
    Architecture(
        name="z-image",
        transformer="ZImageTransformer2DModel",
        config={
            "all_patch_size": (2,),
            "all_f_patch_size": (1,),
            "in_channels": 16,
            "dim": 3840,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "n_heads": 30,
            "n_kv_heads": 30,
            "cap_feat_dim": 2560,
            "rope_theta": 256.0,
            "t_scale": 1000.0,
            "axes_dims": (32, 48, 48),
            "axes_lens": (1024, 512, 512),
        },
        depth=("n_layers",),
        inputs=_z_image,
        size=(1024, 1024, 1),
        is_video=False,
    ),
)
