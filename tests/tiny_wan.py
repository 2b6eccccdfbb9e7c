"""Tiny transformers of Wan's kin, and what their forwards are given."""

from __future__ import annotations

from typing import Any

import torch

from tests.tiny_models import Inputs, TinyModel, randn, text_to_video


def _wan_animate(g: torch.Generator) -> Inputs:
    return text_to_video(12)(g) | {
        "encoder_hidden_states_image": randn(g, 1, 12, 16),
        "pose_hidden_states": randn(g, 1, 4, 1, 24, 14),
        "face_pixel_values": randn(g, 1, 3, 5, 16, 16),
    }


def _anyflow(g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, 1, 2, 4, 24, 14),
        "timestep": torch.full((1, 2), 500.0, dtype=torch.float64),
        "r_timestep": torch.full((1, 2), 250.0, dtype=torch.float64),
        "encoder_hidden_states": randn(g, 1, 12, 16),
    }


def _helios(g: torch.Generator) -> Inputs:
    return text_to_video(4)(g) | {
        "indices_hidden_states": torch.arange(8, 10)[None],
        "indices_latents_history_short": torch.tensor([[0, 7]]),
        "indices_latents_history_mid": torch.arange(5, 7)[None],
        "indices_latents_history_long": torch.arange(1, 5)[None],
        "latents_history_short": randn(g, 1, 4, 2, 24, 14),
        "latents_history_mid": randn(g, 1, 4, 2, 24, 14),
        "latents_history_long": randn(g, 1, 4, 4, 24, 14),
    }


_WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}
_QK_NORM = {"qk_norm": "rms_norm_across_heads"}
_GRID: Any = {"grid": (2, 12, 7), "patch": (1, 2, 2)}

WAN_MODELS: dict[str, TinyModel] = {
    "wan-animate": TinyModel(
        "WanAnimateTransformer3DModel",
        _WAN
        | _QK_NORM
        | {
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 16,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        _wan_animate,
        seq_len=168,
        **_GRID,
    ),
    "chronoedit": TinyModel(
        "ChronoEditTransformer3DModel",
        _WAN | _QK_NORM | {"rope_temporal_skip_len": 8},
        text_to_video(4),
        seq_len=168,
        **_GRID,
    ),
    "anyflow": TinyModel(
        "AnyFlowTransformer3DModel",
        _WAN | {"gate_value": 0.25, "deltatime_type": "r"},
        _anyflow,
        seq_len=168,
        axes="bfchw",
        **_GRID,
    ),
    "skyreels": TinyModel(
        "SkyReelsV2Transformer3DModel",
        _WAN | _QK_NORM,
        text_to_video(4),
        seq_len=168,
        **_GRID,
    ),
    "helios": TinyModel(
        "HeliosTransformer3DModel",
        {name: value for name, value in _WAN.items() if name != "rope_max_seq_len"}
        | _QK_NORM
        | {
            "rope_dim": (4, 4, 4),
            "has_multi_term_memory_patch": True,
            "guidance_cross_attn": True,
            "zero_history_timestep": True,
            "is_amplify_history": True,
        },
        _helios,
        seq_len=6 + 24 + 168 + 168,
        start=6 + 24 + 168,
        **_GRID,
    ),
}
