"""Tiny image transformers, and what their forwards are given: an image of 14 x 12 tokens."""

from __future__ import annotations

from typing import Any

import torch

from tests.tiny_models import Inputs, TinyModel, key_mask, randn, time_of

_GRID: Any = {"grid": (1, 14, 12)}
_PATCHED: Any = _GRID | {"axes": "bchw", "patch": (1, 2, 2)}


def _z_image(g: torch.Generator) -> Inputs:
    return {
        "x": [randn(g, 16, 1, 28, 24), randn(g, 16, 1, 28, 24)],
        "cap_feats": [randn(g, 20, 16), randn(g, 40, 16)],
        "t": torch.tensor([0.5, 0.5], dtype=torch.float64),
    }


def _hunyuan_image(g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, 1, 4, 14, 12),
        "timestep": time_of(),
        "encoder_hidden_states": randn(g, 1, 9, 32),
        "encoder_attention_mask": key_mask(9, 3),
        "encoder_hidden_states_2": randn(g, 1, 5, 32),
        "encoder_attention_mask_2": key_mask(5, 1),
    }


def _hunyuan_image_refiner(g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, 1, 4, 2, 12, 7),
        "timestep": time_of(),
        "encoder_hidden_states": randn(g, 1, 9, 32),
        "encoder_attention_mask": key_mask(9, 3),
    }


def _text_to_image(channels: int, text: int, length: int = 9) -> Any:
    def inputs(g: torch.Generator) -> Inputs:
        return {
            "hidden_states": randn(g, 1, channels, 28, 24),
            "timestep": time_of(),
            "encoder_hidden_states": randn(g, 1, length, text),
        }

    return inputs


def _bria_fibo2(g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, 1, 4, 28, 24),
        "timestep": time_of(0.5),
        "encoder_hidden_states": randn(g, 1, 2, 9, 16),
        "encoder_attention_mask": key_mask(9, 3),
        "context_latents": [randn(g, 1, 4, 8, 10)],
    }


def _bria_fibo2_batch(g: torch.Generator) -> Inputs:
    """Prompts of 3 and 9 tokens, whose gists are of 4 and 8 tokens."""
    return {
        "hidden_states": randn(g, 2, 4, 28, 24),
        "timestep": time_of(0.5).expand(2),
        "encoder_hidden_states": randn(g, 2, 2, 9, 16),
        "encoder_attention_mask": torch.cat([key_mask(9, 6), key_mask(9, 0)]),
    }


def _hidream(g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, 1, 4, 28, 24),
        "timesteps": time_of(),
        "encoder_hidden_states_t5": randn(g, 1, 8, 8),
        "encoder_hidden_states_llama3": randn(g, 2, 1, 8, 4),
        "pooled_embeds": randn(g, 1, 8),
    }


def _cogview(g: torch.Generator) -> Inputs:
    size = torch.tensor([[224.0, 192.0]], dtype=torch.float64)
    return _text_to_image(4, 8)(g) | {
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros(1, 2, dtype=torch.float64),
    }


def _glm_image(g: torch.Generator) -> Inputs:
    return _text_to_image(4, 32)(g) | {
        "prior_token_id": torch.arange(168)[None] % 64,
        "prior_token_drop": torch.zeros(1, dtype=torch.bool),
        "target_size": torch.tensor([[28.0, 24.0]], dtype=torch.float64),
        "crop_coords": torch.zeros(1, 2, dtype=torch.float64),
    }


def _lumina2(g: torch.Generator) -> Inputs:
    return _text_to_image(4, 32)(g) | {"timestep": time_of(0.5), "encoder_attention_mask": key_mask(9, 3)}


def _hunyuan_dit(g: torch.Generator) -> Inputs:
    return _text_to_image(4, 8, 4)(g) | {
        "text_embedding_mask": key_mask(4, 1, torch.float64),
        "encoder_hidden_states_t5": randn(g, 1, 4, 8),
        "text_embedding_mask_t5": key_mask(4, 1, torch.float64),
        "image_meta_size": torch.ones(1, 6, dtype=torch.float64),
        "style": torch.zeros(1, dtype=torch.long),
        "image_rotary_emb": [torch.cos(randn(g, 168, 8)), torch.sin(randn(g, 168, 8))],
    }


def _ernie(g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, 1, 16, 14, 12),
        "timestep": time_of(),
        "text_bth": randn(g, 1, 9, 16),
        "text_lens": torch.tensor([6]),
    }


def _joy_image(g: torch.Generator) -> Inputs:
    # the target comes last here and goes first in the model
    return {
        "hidden_states": randn(g, 1, 2, 4, 1, 24, 14),
        "encoder_hidden_states": randn(g, 1, 9, 16),
        "timestep": time_of(),
    }


def _joy_image_plus(g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, 1, 168 + 20 + 4, 4, 1, 2, 2),
        "encoder_hidden_states": randn(g, 1, 9, 16),
        "encoder_hidden_states_mask": key_mask(9, 3, torch.float64),
        "timestep": time_of(),
        "shape_list": [[(1, 14, 12), (1, 4, 5)]],
    }


_HUNYUAN_IMAGE = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": (1, 1),
    "text_embed_dim": 32,
    "text_embed_2_dim": 32,
    "rope_axes_dim": (4, 4),
}
_FIBO2 = {
    "in_channels": 4,
    "patch_size": 2,
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "cap_feat_dim": 16,
    "injection_layer_ids": (1,),
    "perceiver_num_layers": 1,
    "min_num_gist_tokens": 4,
    "max_num_gist_tokens": 8,
    "gist_step": 4,
    "gist_min_text_len": 4,
    "gist_max_text_len": 8,
    "axes_dims": (4, 6, 6),
    "axes_lens": (64, 64, 64),
}
_COGVIEW = {
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "out_channels": 4,
    "text_embed_dim": 8,
    "time_embed_dim": 8,
    "condition_dim": 4,
}
_JOY = {
    "patch_size": [1, 2, 2],
    "in_channels": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 16,
    "num_layers": 2,
    "rope_dim_list": [4, 6, 6],
    "theta": 256,
}

IMAGE_MODELS: dict[str, TinyModel] = {
    "z-image": TinyModel(
        "ZImageTransformer2DModel",
        {
            "all_patch_size": (2,),
            "all_f_patch_size": (1,),
            "in_channels": 16,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "qk_norm": True,
            "cap_feat_dim": 16,
            "rope_theta": 256.0,
            "t_scale": 1000.0,
            "axes_dims": [8, 4, 4],
            "axes_lens": [256, 32, 32],
        },
        _z_image,
        seq_len=192,
        also=((0, 192 + 64),),
        grid=(1, 14, 12),
        patch=(1, 2, 2),
        axes="cfhw",
        latents="x",
    ),
    "hunyuan-image": TinyModel(
        "HunyuanImageTransformer2DModel", _HUNYUAN_IMAGE, _hunyuan_image, seq_len=168 + 14, axes="bchw", **_GRID
    ),
    "hunyuan-image-refiner": TinyModel(
        "HunyuanImageTransformer2DModel",
        _HUNYUAN_IMAGE | {"patch_size": (1, 1, 1), "rope_axes_dim": (2, 2, 4), "text_embed_2_dim": None},
        _hunyuan_image_refiner,
        (2, 12, 7),
        168 + 9,
    ),
    "bria-fibo2": TinyModel(
        "BriaFibo2Transformer2DModel", _FIBO2, _bria_fibo2, seq_len=168 + 20, also=((8, 8 + 168 + 20),), **_PATCHED
    ),
    "bria-fibo2-batch": TinyModel(
        "BriaFibo2Transformer2DModel", _FIBO2, _bria_fibo2_batch, seq_len=168, also=((0, 168 + 8),), **_PATCHED
    ),
    "hidream": TinyModel(
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_channels": [8, 4],
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "num_activated_experts": 2,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (32, 32),
            "llama_layers": (0, 1),
            "force_inference_output": True,
        },
        _hidream,
        seq_len=256 + 24,
        **_PATCHED,
    ),
    "cogview4": TinyModel("CogView4Transformer2DModel", _COGVIEW, _cogview, start=9, seq_len=9 + 168, **_PATCHED),
    "cogview3plus": TinyModel(
        "CogView3PlusTransformer2DModel",
        _COGVIEW | {"pos_embed_max_size": 16, "sample_size": 32},
        _cogview,
        start=9,
        seq_len=9 + 168,
        **_PATCHED,
    ),
    "glm-image": TinyModel(
        "GlmImageTransformer2DModel",
        _COGVIEW | {"text_embed_dim": 32, "time_embed_dim": 16, "prior_vq_quantizer_codebook_size": 64},
        _glm_image,
        start=9,
        seq_len=9 + 168,
        **_PATCHED,
    ),
    "lumina2": TinyModel(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 32,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (128, 128, 128),
            "cap_feat_dim": 32,
        },
        _lumina2,
        seq_len=168,
        also=((6, 6 + 168),),
        **_PATCHED,
    ),
    "aura-flow": TinyModel(
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 32,
            "patch_size": 2,
            "in_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_projection_dim": 32,
            "joint_attention_dim": 32,
            "out_channels": 4,
            "pos_embed_max_size": 256,
        },
        _text_to_image(4, 32),
        start=8 + 9,
        seq_len=8 + 9 + 168,
        **_PATCHED,
    ),
    "pixart": TinyModel(
        "PixArtTransformer2DModel",
        {
            "sample_size": 32,
            "num_layers": 2,
            "patch_size": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "in_channels": 4,
            "cross_attention_dim": 16,
            "caption_channels": 8,
            "out_channels": 8,
            "use_additional_conditions": False,
        },
        _text_to_image(4, 8),
        seq_len=168,
        **_PATCHED,
    ),
    "hunyuan-dit": TinyModel(
        "HunyuanDiT2DModel",
        {
            "sample_size": 32,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4,
            "hidden_size": 16,
            "text_len": 4,
            "text_len_t5": 4,
        },
        _hunyuan_dit,
        seq_len=168,
        **_PATCHED,
    ),
    "ernie-image": TinyModel(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 16,
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 1,
            "text_in_dim": 16,
            "rope_axes_dim": (8, 4, 4),
        },
        _ernie,
        seq_len=168 + 9,
        axes="bchw",
        **_GRID,
    ),
    "joy-image": TinyModel(
        "JoyImageEditTransformer3DModel",
        _JOY,
        _joy_image,
        (2, 12, 7),
        168 + 9,
        axes="bjc1hw",
        patch=(1, 2, 2),
    ),
    "joy-image-plus": TinyModel(
        "JoyImageEditPlusTransformer3DModel",
        _JOY,
        _joy_image_plus,
        seq_len=192 + 9,
        axes="bsc",
        **_GRID,
    ),
}
