"""Tiny video transformers, and what their forwards are given."""

from __future__ import annotations

from typing import Any

import torch

from tests.tiny_models import Inputs, TinyModel, key_mask, randn, text_to_video, time_of


def _hunyuan_15(g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, 1, 4, 2, 12, 7),
        "timestep": time_of(),
        "encoder_hidden_states": randn(g, 1, 6, 16),
        "encoder_attention_mask": key_mask(6, 2, torch.float64),
        "encoder_hidden_states_2": randn(g, 1, 4, 8),
        "encoder_attention_mask_2": key_mask(4, 1, torch.float64),
        "image_embeds": torch.zeros(1, 3, 12, dtype=torch.float64),
    }


def _hunyuan_15_image(g: torch.Generator) -> Inputs:
    """Two samples that begin with a picture, with prompts of different lengths."""
    return {
        "hidden_states": randn(g, 2, 4, 2, 12, 7),
        "timestep": time_of().expand(2),
        "encoder_hidden_states": randn(g, 2, 6, 16),
        "encoder_attention_mask": torch.cat([key_mask(6, 2, torch.float64), key_mask(6, 4, torch.float64)]),
        "encoder_hidden_states_2": randn(g, 2, 4, 8),
        "encoder_attention_mask_2": torch.cat([key_mask(4, 1, torch.float64), key_mask(4, 0, torch.float64)]),
        "image_embeds": randn(g, 2, 3, 12),
    }


def _ltx2(g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, 1, 2 * 12 * 7 + 5, 4),
        "audio_hidden_states": randn(g, 1, 9, 4),
        "encoder_hidden_states": randn(g, 1, 16, 16),
        "audio_encoder_hidden_states": randn(g, 1, 16, 16),
        "encoder_attention_mask": key_mask(16, 4),
        "audio_encoder_attention_mask": key_mask(16, 4),
        "timestep": time_of(),
        "num_frames": 2,
        "height": 12,
        "width": 7,
        "audio_num_frames": 9,
        "fps": 25.0,
        "video_coords": _ltx2_coordinates(2, 12, 7, 5),
    }


def _ltx2_coordinates(frames: int, height: int, width: int, conditions: int) -> torch.Tensor:
    """Where tokens begin and end; conditions lie on the first frame."""
    axes = (torch.arange(frames) * 8 / 25.0, torch.arange(height) * 32.0, torch.arange(width) * 32.0)
    begin = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
    begin = torch.cat([begin, begin[:, :conditions]], 1)
    end = begin + torch.tensor([8 / 25.0, 32.0, 32.0])[:, None]
    # As the pipelines have it: a frame ends where the next begins, to the bit.
    end[0] = torch.cat([axes[0], axes[0][-1:] + 8 / 25.0])[1:][(begin[0][:, None] == axes[0]).long().argmax(1)]
    return torch.stack([begin, end], -1)[None]


def _cosmos(g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, 1, 5, 2, 24, 14),
        "condition_mask": torch.ones(1, 1, 2, 24, 14, dtype=torch.float64),
        "timestep": time_of(),
        "encoder_hidden_states": randn(g, 1, 12, 16),
        "fps": 30,
    }


def _framepack(g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, 1, 4, 2, 24, 14),
        "timestep": time_of(),
        "encoder_hidden_states": randn(g, 1, 12, 16),
        "pooled_projections": randn(g, 1, 8),
        "encoder_attention_mask": key_mask(12, 4, torch.float64),
        "guidance": time_of(),
        "image_embeds": randn(g, 1, 5, 16),
        "indices_latents": torch.arange(7, 9).double(),
        "latents_clean": randn(g, 1, 4, 2, 24, 14),
        "indices_latents_clean": torch.tensor([0.0, 6.0]).double(),
        "latents_history_2x": randn(g, 1, 4, 3, 24, 14),
        "indices_latents_history_2x": torch.arange(4, 7).double(),
        "latents_history_4x": randn(g, 1, 4, 5, 24, 14),
        "indices_latents_history_4x": torch.arange(1, 6).double(),
    }


def _kandinsky(g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, 1, 2, 24, 14, 4),
        "timestep": time_of(),
        "encoder_hidden_states": randn(g, 1, 9, 16),
        "pooled_projections": randn(g, 1, 8),
        "visual_rope_pos": [torch.arange(2), torch.arange(12), torch.arange(7)],
        "text_rope_pos": torch.arange(9),
    }


def _kandinsky6(g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, 1, 2, 24, 14, 4),
        "timestep": time_of(),
        "encoder_hidden_states": randn(g, 1, 9, 16),
        "pooled_projections": randn(g, 1, 8),
        "audio_hidden_states": randn(g, 1, 11, 6),
        "encoder_attention_mask": key_mask(9, 3)[:, None, None],
    }


def _motif(g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, 1, 9, 2, 12, 7),
        "timestep": time_of(),
        "encoder_hidden_states": randn(g, 1, 12, 16),
        "encoder_attention_mask": key_mask(12, 3),
        "image_embeds": randn(g, 1, 5, 4),
    }


def _mochi(g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, 2, 4, 2, 24, 14),
        "timestep": time_of().expand(2),
        "encoder_hidden_states": randn(g, 2, 16, 16),
        "encoder_attention_mask": torch.cat([key_mask(16, 6), key_mask(16, 0)]),
    }


def _allegro(g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, 1, 4, 2, 24, 14),
        "timestep": time_of(),
        "encoder_hidden_states": randn(g, 1, 16, 8),
        "encoder_attention_mask": key_mask(16, 4),
    }


def _consisid(g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, 1, 2, 4, 24, 14),
        "timestep": time_of(),
        "encoder_hidden_states": randn(g, 1, 8, 8),
        "id_vit_hidden": [randn(g, 1, 2, 2)],
        "id_cond": randn(g, 1, 2),
    }


_GRID: Any = {"grid": (2, 12, 7), "patch": (1, 2, 2)}

_HUNYUAN_15 = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": 16,
    "text_embed_2_dim": 8,
    "image_embed_dim": 12,
    "rope_axes_dim": (2, 2, 4),
    "target_size": 16,
    "task_type": "t2v",
}

VIDEO_MODELS: dict[str, TinyModel] = {
    "hunyuan-1.5": TinyModel("HunyuanVideo15Transformer3DModel", _HUNYUAN_15, _hunyuan_15, (2, 12, 7), 168 + 13),
    "hunyuan-1.5-image": TinyModel(
        "HunyuanVideo15Transformer3DModel", _HUNYUAN_15, _hunyuan_15_image, (2, 12, 7), 168 + 13
    ),
    "ltx2": TinyModel(
        "LTX2VideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8,
            "num_layers": 2,
            "caption_channels": 16,
            "rope_double_precision": False,
        }
        | {"qk_norm": "rms_norm_across_heads"},
        _ltx2,
        (2, 12, 7),
        168 + 5,
        axes="bsc",
    ),
    "cosmos": TinyModel(
        "CosmosTransformer3DModel",
        {
            "in_channels": 6,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "mlp_ratio": 2,
            "text_embed_dim": 16,
            "adaln_lora_dim": 4,
            "max_size": (4, 32, 32),
            "patch_size": (1, 2, 2),
            "rope_scale": (2.0, 1.0, 1.0),
            "concat_padding_mask": False,  # which needs torchvision
            "extra_pos_embed_type": "learnable",
        },
        _cosmos,
        seq_len=168,
        dtype=torch.float32,
        **_GRID,
    ),
    "framepack": TinyModel(
        "HunyuanVideoFramepackTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 10,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (2, 4, 4),
            "has_image_proj": True,
            "image_proj_dim": 16,
            "has_clean_x_embedder": True,
        },
        _framepack,
        seq_len=12 + 48 + 168 + 168 + 5 + 8,
        start=12 + 48 + 168,
        **_GRID,
    ),
    "kandinsky5": TinyModel(
        "Kandinsky5Transformer3DModel",
        {
            "in_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "out_visual_dim": 4,
            "model_dim": 32,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
        },
        _kandinsky,
        seq_len=168,
        axes="bfhwc",
        dtype=torch.float32,
        **_GRID,
    ),
    "kandinsky6": TinyModel(
        "Kandinsky6Transformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
            "visual_cond": False,
            "in_audio_dim": 6,
            "out_audio_dim": 6,
        },
        _kandinsky6,
        seq_len=168,
        axes="bfhwc",
        dtype=torch.float32,
        **_GRID,
    ),
    "motif": TinyModel(
        "MotifVideoTransformer3DModel",
        {
            "in_channels": 9,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_single_layers": 2,
            "num_decoder_layers": 1,
            "patch_size": 1,
            "patch_size_t": 1,
            "text_embed_dim": 16,
            "image_embed_dim": 4,
            "rope_axes_dim": (4, 4, 4),
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
        _motif,
        (2, 12, 7),
        168 + 17,
        also=((0, 2 * 168),),
        dtype=torch.float32,
    ),
    "mochi": TinyModel(
        "MochiTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 4,
            "max_sequence_length": 16,
        },
        _mochi,
        seq_len=168 + 10,
        also=((0, 168 + 16),),
        **_GRID,
    ),
    "allegro": TinyModel(
        "AllegroTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": 16,
            "sample_width": 14,
            "sample_height": 24,
            "sample_frames": 8,
            "caption_channels": 8,
        },
        _allegro,
        seq_len=168,
        **_GRID,
    ),
    "consisid": TinyModel(
        "ConsisIDTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 2,
            "text_embed_dim": 8,
            "num_layers": 2,
            "sample_width": 14,
            "sample_height": 24,
            "sample_frames": 8,
            "max_text_seq_length": 8,
            "cross_attn_interval": 1,
            "is_train_face": True,
            "cross_attn_dim_head": 1,
            "cross_attn_num_heads": 1,
            "LFE_id_dim": 2,
            "LFE_vit_dim": 2,
            "LFE_depth": 5,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 1,
            "LFE_num_querie": 1,
            "LFE_output_dim": 10,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 1,
        },
        _consisid,
        seq_len=8 + 168,
        start=8,
        axes="bfchw",
        **_GRID,
    ),
    "easyanimate": TinyModel(
        "EasyAnimateTransformer3DModel",
        {
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "in_channels": 4,
            "mmdit_layers": 1,
            "num_layers": 2,
            "out_channels": 4,
            "patch_size": 2,
            "sample_height": 60,
            "sample_width": 90,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
        },
        text_to_video(4),
        seq_len=12 + 168,
        start=12,
        **_GRID,
    ),
}
