"""Tiny transformers of FLUX's kin, and what their forwards are given: an image of 14 x 12 tokens."""

from __future__ import annotations

from typing import Any

import torch

from tests.tiny_models import Inputs, TinyModel, key_mask, randn, time_of

_PACKED: Any = {"grid": (1, 14, 12), "axes": "bsc"}


def _ids(height: int, width: int, image: int = 0, columns: int = 3) -> torch.Tensor:
    """(image, row, column) of each token."""
    ids = torch.zeros(height * width, columns)
    ids[:, 0] = image
    ids[:, 1:3] = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    return ids


def _flux2(g: torch.Generator) -> Inputs:
    text = torch.zeros(1, 9, 4)
    text[..., 3] = torch.arange(9)
    return {
        "hidden_states": randn(g, 1, 168 + 20, 4),
        "encoder_hidden_states": randn(g, 1, 9, 32),
        "img_ids": torch.cat([_ids(14, 12, 0, 4), _ids(4, 5, 10, 4)])[None],
        "txt_ids": text,
        "timestep": time_of(0.5),
        "guidance": time_of(1.0),
    }


def _flux3(g: torch.Generator) -> Inputs:
    halves = _ids(14, 12, 0, 4)
    halves[:, 1:3] /= 2
    return {
        "hidden_states": randn(g, 1, 168, 4),
        "encoder_hidden_states": randn(g, 1, 9, 32),
        "img_ids": halves,
        "txt_ids": torch.zeros(9, 4),
        "timestep": time_of(0.5),
    }


def _of_flux(text: int = 9, **more: Any) -> Any:
    """Inputs of FLUX's kin: a prompt, an image and a smaller reference behind it."""

    def inputs(g: torch.Generator) -> Inputs:
        return {
            "hidden_states": randn(g, 1, 168 + 20, 4),
            "encoder_hidden_states": randn(g, 1, text, 32),
            "img_ids": torch.cat([_ids(14, 12), _ids(4, 5, 1)]),
            "txt_ids": torch.zeros(text, 3),
            "timestep": time_of(0.5),
        } | {name: make(g) for name, make in more.items()}

    return inputs


def _krea2(g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, 1, 168, 8),
        "encoder_hidden_states": randn(g, 1, 9, 2, 16),
        "timestep": time_of(0.5),
        "position_ids": torch.cat([torch.zeros(9, 3), _ids(14, 12)]),
        "encoder_attention_mask": key_mask(9, 3),
    }


_FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": [4, 4, 8],
}
_BRIA = _FLUX | {"pooled_projection_dim": None, "attention_head_dim": 8, "axes_dims_rope": [0, 4, 4]}
_FLUX_TEXT: Any = _PACKED | {"start": 9, "seq_len": 9 + 168 + 20}

FLUX_MODELS: dict[str, TinyModel] = {
    "flux2": TinyModel(
        "Flux2Transformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "timestep_guidance_channels": 256,
            "axes_dims_rope": [4, 4, 4, 4],
        },
        _flux2,
        start=9,
        seq_len=9 + 168 + 20,
        **_PACKED,
    ),
    "chroma": TinyModel(
        "ChromaTransformer2DModel",
        _FLUX | {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        _of_flux(),
        **_FLUX_TEXT,
    ),
    "bria": TinyModel("BriaTransformer2DModel", _BRIA, _of_flux(), **_FLUX_TEXT),
    "bria-fibo": TinyModel(
        "BriaFiboTransformer2DModel",
        _BRIA | {"text_encoder_dim": 16},
        _of_flux(
            text_encoder_layers=lambda g: [randn(g, 1, 9, 16), randn(g, 1, 9, 16)],
            joint_attention_kwargs=lambda g: {
                "attention_mask": torch.cat([key_mask(9, 3), key_mask(188, 0)], 1)[:, None, None]
            },
        ),
        **_FLUX_TEXT,
    ),
    "ovis": TinyModel("OvisImageTransformer2DModel", _FLUX | {"out_channels": 4}, _of_flux(), **_FLUX_TEXT),
    "longcat": TinyModel(
        "LongCatImageTransformer2DModel", _FLUX | {"pooled_projection_dim": 32}, _of_flux(), **_FLUX_TEXT
    ),
    "krea2": TinyModel(
        "Krea2Transformer2DModel",
        {
            "in_channels": 8,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 16,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2),
        },
        _krea2,
        start=9,
        seq_len=9 + 168,
        **_PACKED,
    ),
    "flux3": TinyModel(
        "Flux3Transformer2DModel",
        {
            "in_channels": 4,
            "cond_in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "timestep_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        _flux3,
        seq_len=168,
        also=((9, 9 + 168),),
        **_PACKED,
    ),
}
