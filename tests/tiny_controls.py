"""Tiny control networks, with random weights, and inputs of a known latent grid."""

from __future__ import annotations

from typing import Any

import torch

from tests.tiny_flux import _ids
from tests.tiny_images import _hunyuan_dit
from tests.tiny_models import Inputs, TinyModel, key_mask, randn, time_of
from tests.tiny_registry import MODELS

_PACKED: Any = {"grid": (1, 14, 12), "axes": "bsc", "start": 9, "seq_len": 9 + 168}
_PATCHED: Any = {"grid": (1, 14, 12), "axes": "bchw", "patch": (1, 2, 2)}
PLACES = (0, 1)


class TinyControl(TinyModel):
    """Gives a sample for each block."""

    @torch.no_grad()
    def run(self, model: Any, given: Inputs | None = None) -> torch.Tensor:
        out = model(**self.given() if given is None else given)
        if isinstance(out, dict) and set(out) == set(PLACES):
            return torch.stack(list(out.values()))
        return torch.stack([one for part in out.values() for one in part])


class _SharesBlocks(TinyControl):
    """Has embedders and a refiner of its transformer."""

    def build(self) -> Any:
        model = super().build()
        return type(model).from_transformer(model, MODELS["z-image"].build())


def _flux(g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, 1, 168, 4),
        "controlnet_cond": randn(g, 1, 168, 4),
        "encoder_hidden_states": randn(g, 1, 9, 32),
        "pooled_projections": randn(g, 1, 32),
        "img_ids": _ids(14, 12),
        "txt_ids": torch.zeros(9, 3),
        "timestep": time_of(0.5),
    }


def _sd3(g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, 1, 4, 28, 24),
        "controlnet_cond": randn(g, 1, 4, 28, 24),
        "encoder_hidden_states": randn(g, 1, 9, 16),
        "pooled_projections": randn(g, 1, 8),
        "timestep": time_of(),
    }


def _qwen_image(g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, 1, 168, 16),
        "controlnet_cond": randn(g, 1, 168, 16),
        "encoder_hidden_states": randn(g, 1, 9, 16),
        "encoder_hidden_states_mask": key_mask(9, 3),
        "timestep": time_of(0.5),
        "img_shapes": [[(1, 14, 12)]],
    }


def _hunyuan(g: torch.Generator) -> Inputs:
    return _hunyuan_dit(g) | {"controlnet_cond": randn(g, 1, 4, 28, 24)}


def _z_image(g: torch.Generator) -> Inputs:
    return {
        "x": [randn(g, 16, 1, 28, 24)],
        "cap_feats": [randn(g, 20, 16)],
        "t": torch.tensor([0.5], dtype=torch.float64),
        "control_context": [randn(g, 16, 1, 28, 24)],
    }


def _cosmos(g: torch.Generator) -> Inputs:
    return {
        "controls_latents": randn(g, 1, 4, 2, 24, 14),
        "latents": randn(g, 1, 4, 2, 24, 14),
        "timestep": time_of(0.5),
        "encoder_hidden_states": randn(g, 1, 9, 16),
        "condition_mask": torch.zeros(1, 1, 2, 24, 14, dtype=torch.float64),
        "padding_mask": torch.zeros(1, 1, 24, 14, dtype=torch.float64),
    }


CONTROL_MODELS: dict[str, TinyModel] = {
    "flux": TinyControl(
        "FluxControlNetModel",
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": [4, 4, 8],
        },
        _flux,
        **_PACKED,
    ),
    "sd3": TinyControl(
        "SD3ControlNetModel",
        {
            "sample_size": 32,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 8,
            "out_channels": 4,
            "pos_embed_max_size": 32,
        },
        _sd3,
        seq_len=168 + 9,
        **_PATCHED,
    ),
    "qwen-image": TinyControl(
        "QwenImageControlNetModel",
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 4, 4),
        },
        _qwen_image,
        **_PACKED,
    ),
    "hunyuan-dit": TinyControl(
        "HunyuanDiT2DControlNetModel",
        {
            "sample_size": 32,
            "patch_size": 2,
            "in_channels": 4,
            "transformer_num_layers": 6,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4,
            "hidden_size": 16,
            "text_len": 4,
            "text_len_t5": 4,
        },
        _hunyuan,
        seq_len=168,
        **_PATCHED,
    ),
    "z-image": _SharesBlocks(
        "ZImageControlNetModel",
        {
            "control_layers_places": list(PLACES),
            "control_refiner_layers_places": [0],
            "control_in_dim": 16,
            "add_control_noise_refiner": "control_noise_refiner",
            "dim": 32,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
        },
        _z_image,
        grid=(1, 14, 12),
        seq_len=192,
        also=((0, 192 + 32),),
        axes="cfhw",
        patch=(1, 2, 2),
        latents="x",
    ),
    "cosmos": TinyControl(
        "CosmosControlNetModel",
        {
            "n_controlnet_blocks": 2,
            "in_channels": 8,
            "latent_channels": 6,
            "model_channels": 24,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "mlp_ratio": 2,
            "text_embed_dim": 16,
            "adaln_lora_dim": 4,
            "max_size": (4, 32, 32),
            "extra_pos_embed_type": "learnable",
        },
        _cosmos,
        grid=(2, 12, 7),
        seq_len=168,
        axes="bcfhw",
        patch=(1, 2, 2),
        latents="latents",
        dtype=torch.float32,
    ),
}
