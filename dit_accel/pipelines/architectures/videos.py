"""Video models: sizes and sources of their configs, and what their pipelines pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .architecture import TIMESTEP, Architecture, Clip, Latents


def _wan(model: nn.Module, latents: Latents) -> dict[str, Any]:
    config: Any = model.config
    return {
        "hidden_states": latents.noise(config.in_channels, latents.frames, latents.height, latents.width),
        "timestep": latents.full(TIMESTEP, torch.float32),
        "encoder_hidden_states": latents.noise(512, 4096),
    }


def _wan_timestep_each(model: nn.Module, latents: Latents) -> dict[str, Any]:
    # Wan 2.2's 5B says the timestep of each token, since a first frame that is given has none.
    tokens = latents.frames * (latents.height // 2) * (latents.width // 2)
    arguments = _wan(model, latents)
    return {**arguments, "timestep": arguments["timestep"][:, None].expand(-1, tokens)}


def _hunyuan_video(_model: nn.Module, latents: Latents) -> dict[str, Any]:
    # A short prompt: 64 of its 256 tokens, the rest is padding that the model masks.
    mask = torch.zeros(latents.batch, 256, dtype=latents.dtype, device=latents.device)
    mask[:, :64] = 1
    return {
        "hidden_states": latents.noise(16, latents.frames, latents.height, latents.width),
        "timestep": latents.full(TIMESTEP),
        "encoder_hidden_states": latents.noise(256, 4096),
        "encoder_attention_mask": mask,
        "pooled_projections": latents.noise(768),
        "guidance": latents.full(6000.0),
    }


def _hunyuan_video_15(model: nn.Module, latents: Latents) -> dict[str, Any]:
    config: Any = model.config

    def text(length: int, kept: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.zeros(latents.batch, length, dtype=latents.dtype, device=latents.device)
        mask[:, :kept] = 1
        return latents.noise(length, width), mask

    # A short prompt without words to be written, and no picture: the rest of 1,000, 256 and 729 tokens is padding.
    prompt, prompt_mask = text(1000, 64, config.text_embed_dim)
    glyphs, glyphs_mask = text(256, 0, config.text_embed_2_dim)
    return {
        # The latents, those of a picture to start from, and where there is one.
        "hidden_states": latents.noise(config.in_channels, latents.frames, latents.height, latents.width),
        "timestep": latents.full(TIMESTEP),
        "encoder_hidden_states": prompt,
        "encoder_attention_mask": prompt_mask,
        "encoder_hidden_states_2": glyphs,
        "encoder_attention_mask_2": glyphs_mask,
        "image_embeds": torch.zeros(
            latents.batch, 729, config.image_embed_dim, dtype=latents.dtype, device=latents.device
        ),
    }


def _cogvideox(model: nn.Module, latents: Latents) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    config: Any = model.config
    grid = (latents.height // config.patch_size, latents.width // config.patch_size)
    base_width, base_height = (
        config.sample_width // config.patch_size,
        config.sample_height // config.patch_size,
    )
    rotary = get_3d_rotary_pos_embed(
        embed_dim=config.attention_head_dim,
        crops_coords=get_resize_crop_region_for_grid(grid, base_width, base_height),
        grid_size=grid,
        temporal_size=latents.frames,
        device=latents.device,
    )
    return {
        # Frames come before channels.
        "hidden_states": latents.noise(latents.frames, 16, latents.height, latents.width),
        "encoder_hidden_states": latents.noise(config.max_text_seq_length, 4096),
        "timestep": latents.full(TIMESTEP, torch.int64),
        "image_rotary_emb": rotary,
    }


def _ltx(_model: nn.Module, latents: Latents) -> dict[str, Any]:
    # A short prompt: 64 of its 128 tokens.
    mask = torch.zeros(latents.batch, 128, dtype=torch.int64, device=latents.device)
    mask[:, :64] = 1
    return {
        "hidden_states": latents.noise(latents.frames * latents.height * latents.width, 128),
        "encoder_hidden_states": latents.noise(128, 4096),
        "timestep": latents.full(TIMESTEP, torch.float32),
        "encoder_attention_mask": mask,
        "num_frames": latents.frames,
        "height": latents.height,
        "width": latents.width,
        # Pixels per latent: seconds at 25 frames a second, rows, columns.
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def _ltx2(model: nn.Module, latents: Latents) -> dict[str, Any]:
    config: Any = model.config
    pixel_frames = (latents.frames - 1) * 8 + 1
    # 25 latents of sound a second.
    sound = round(pixel_frames / 24 * 25)
    return {
        "hidden_states": latents.noise(latents.frames * latents.height * latents.width, config.in_channels),
        "audio_hidden_states": latents.noise(sound, config.audio_in_channels),
        # The connectors fill a prompt up with learned tokens, so that none is masked.
        "encoder_hidden_states": latents.noise(1024, config.caption_channels),
        "audio_encoder_hidden_states": latents.noise(1024, config.caption_channels),
        "timestep": latents.full(TIMESTEP),
        "num_frames": latents.frames,
        "height": latents.height,
        "width": latents.width,
        "fps": 24.0,
        "audio_num_frames": sound,
    }


# Length of a prompt that Qwen3-VL was given with its template.
_H3_TEXT = 256
# Of rotary time to one latent frame: 24 frames and 40 latents of sound a second, on the clock of the sound.
_H3_SPANS = (1, 4, 4, 4, 4)


def _minimax_h3(model: nn.Module, latents: Latents) -> dict[str, Any]:
    config: Any = model.config
    height, width = latents.height // 2, latents.width // 2
    chunks = (latents.frames - 2) // 5
    sound = 2 * round((17 * chunks + 5) / 24 * 40)  # two channels
    video = latents.frames * height * width
    length = _H3_TEXT + sound + video
    # (time, row, column) of each token, the media's time behind the prompt's; the image is 32 units a side if square.
    places = torch.zeros(length, 3, dtype=torch.float64)
    places[:_H3_TEXT, 0] = torch.arange(_H3_TEXT)
    places[_H3_TEXT : _H3_TEXT + sound, 0] = _H3_TEXT + torch.arange(sound // 2).repeat(2)
    spans = torch.tensor([_H3_SPANS[n % 5] for n in range(latents.frames)], dtype=torch.float64) * 5 / 3
    time = _H3_TEXT + spans.cumsum(0) - spans
    side = (latents.height * latents.width) ** 0.5
    rows, columns = (
        (0.5 - size / side / 2 + torch.arange(tokens, dtype=torch.float64) / tokens * size / side) * 32
        for size, tokens in ((latents.height, height), (latents.width, width))
    )
    places[_H3_TEXT + sound :] = torch.cartesian_prod(time, rows, columns)
    # Two channels of sound lie at the image's left and right.
    places[_H3_TEXT : _H3_TEXT + sound, 2] = torch.stack([columns[0], columns[-1]]).repeat_interleave(sound // 2)
    places = places.to(latents.device)
    order = torch.arange(length, device=latents.device)
    text, audio, rows_of_video = order.split([_H3_TEXT, sound, video])
    tags = torch.zeros(length, dtype=torch.long, device=latents.device)
    tags[text], tags[audio] = 1, 2
    return {
        "hidden_states": latents.noise(video, config.in_channels * 4),
        "audio_hidden_states": latents.noise(sound, config.audio_in_channels),
        "encoder_hidden_states": latents.noise(_H3_TEXT, config.text_dim),
        # One noise level for all, in [0, 1].
        "timestep": torch.full((1,), TIMESTEP / 1000, dtype=torch.float32, device=latents.device),
        "timestep_indices": torch.zeros(length, dtype=torch.long, device=latents.device),
        "token_tags": tags,
        "position_ids": places,
        "video_indices": rows_of_video,
        "audio_indices": audio,
        "text_indices": text,
    }


_WAN_14B = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
}

VIDEO_ARCHITECTURES = (
    # The configs of Wan-Video/Wan2.1 (wan/configs), and diffusers' conversion script.
    Architecture(
        name="wan2.1-1.3b",
        transformer="WanTransformer3DModel",
        config=_WAN_14B | {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        depth=("num_layers",),
        inputs=_wan,
        size=(832, 480, 81),
    ),
    Architecture(
        name="wan2.1-14b",
        transformer="WanTransformer3DModel",
        config=_WAN_14B,
        depth=("num_layers",),
        inputs=_wan,
        size=(1280, 720, 81),
    ),
    # One of its two experts: they are alike, and one runs at a time.
    Architecture(
        name="wan2.2-a14b",
        transformer="WanTransformer3DModel",
        config=_WAN_14B,
        depth=("num_layers",),
        inputs=_wan,
        size=(1280, 720, 81),
    ),
    # The card of Wan-AI/Wan2.2-TI2V-5B: 5 billion parameters, an autoencoder of 4 x 16 x 16, 720p.
    Architecture(
        name="wan2.2-5b",
        transformer="WanTransformer3DModel",
        config=_WAN_14B
        | {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
        depth=("num_layers",),
        inputs=_wan_timestep_each,
        size=(1280, 704, 121),
        stride=16,
        multiple=32,
    ),
    Architecture(
        name="hunyuanvideo",
        transformer="HunyuanVideoTransformer3DModel",
        config={
            "in_channels": 16,
            "out_channels": 16,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "num_layers": 20,
            "num_single_layers": 40,
            "num_refiner_layers": 2,
            "mlp_ratio": 4.0,
            "patch_size": 2,
            "patch_size_t": 1,
            "qk_norm": "rms_norm",
            "guidance_embeds": True,
            "text_embed_dim": 4096,
            "pooled_projection_dim": 768,
            "rope_theta": 256.0,
            "rope_axes_dim": (16, 56, 56),
        },
        depth=("num_layers", "num_single_layers"),
        inputs=_hunyuan_video,
        size=(1280, 720, 129),
    ),
    # diffusers' defaults, those of 480p; the card of tencent/HunyuanVideo-1.5 says 8.3 billion.
    Architecture(
        name="hunyuanvideo-1.5",
        transformer="HunyuanVideo15Transformer3DModel",
        config={
            "in_channels": 65,
            "out_channels": 32,
            "num_attention_heads": 16,
            "attention_head_dim": 128,
            "num_layers": 54,
            "num_refiner_layers": 2,
            "mlp_ratio": 4.0,
            "patch_size": 1,
            "patch_size_t": 1,
            "qk_norm": "rms_norm",
            "text_embed_dim": 3584,
            "text_embed_2_dim": 1472,
            "image_embed_dim": 1152,
            "rope_theta": 256.0,
            "rope_axes_dim": (16, 56, 56),
            "target_size": 640,
            "task_type": "t2v",
        },
        depth=("num_layers",),
        inputs=_hunyuan_video_15,
        size=(848, 480, 121),
        stride=16,
        patch=1,
    ),
    Architecture(
        name="cogvideox-5b",
        transformer="CogVideoXTransformer3DModel",
        config={
            "num_attention_heads": 48,
            "attention_head_dim": 64,
            "in_channels": 16,
            "out_channels": 16,
            "time_embed_dim": 512,
            "text_embed_dim": 4096,
            "num_layers": 42,
            "sample_width": 90,
            "sample_height": 60,
            "sample_frames": 49,
            "patch_size": 2,
            "temporal_compression_ratio": 4,
            "max_text_seq_length": 226,
            "use_rotary_positional_embeddings": True,
        },
        depth=("num_layers",),
        inputs=_cogvideox,
        size=(720, 480, 49),
    ),
    Architecture(
        name="ltx",
        transformer="LTXVideoTransformer3DModel",
        config={
            "in_channels": 128,
            "out_channels": 128,
            "patch_size": 1,
            "patch_size_t": 1,
            "num_attention_heads": 32,
            "attention_head_dim": 64,
            "cross_attention_dim": 2048,
            "num_layers": 28,
            "qk_norm": "rms_norm_across_heads",
            "caption_channels": 4096,
        },
        depth=("num_layers",),
        inputs=_ltx,
        size=(704, 480, 161),
        clip=Clip(8),
        stride=32,
        multiple=32,
        patch=1,
    ),
    # The config of Lightricks/LTX-2 by diffusers' conversion script (2.0): 14 + 5 billion parameters.
    Architecture(
        name="ltx2",
        transformer="LTX2VideoTransformer3DModel",
        config={
            "in_channels": 128,
            "out_channels": 128,
            "num_attention_heads": 32,
            "attention_head_dim": 128,
            "cross_attention_dim": 4096,
            "audio_in_channels": 128,
            "audio_out_channels": 128,
            "audio_num_attention_heads": 32,
            "audio_attention_head_dim": 64,
            "audio_cross_attention_dim": 2048,
            "num_layers": 48,
            "caption_channels": 3840,
            "qk_norm": "rms_norm_across_heads",
            "rope_type": "split",
        },
        depth=("num_layers",),
        inputs=_ltx2,
        size=(1920, 1088, 121),
        clip=Clip(8),
        stride=32,
        multiple=32,
        patch=1,
    ),
    # diffusers' defaults, which MiniMaxAI/MiniMax-H3 has; its pull request (#14355) says 33 billion.
    Architecture(
        name="minimax-h3",
        transformer="MiniMaxH3Transformer3DModel",
        config={
            "num_attention_heads": 56,
            "attention_head_dim": 128,
            "hidden_size": 5376,
            "num_layers": 50,
            "num_refiner_layers": 2,
            "ffn_dim": 14336,
            "in_channels": 24,
            "audio_in_channels": 32,
            "patch_size": (1, 2, 2),
            "text_dim": 5120,
            "freq_dim": 256,
            "time_embed_hidden_dim": 5376,
            "time_embed_dim": 2688,
            "rope_freq_dim": 16,
        },
        depth=("num_layers",),
        inputs=_minimax_h3,
        size=(1344, 768, 124),
        clip=Clip(17, chunk_latents=5, first=5, first_latents=2),
        stride=16,
        multiple=32,
    ),
)
