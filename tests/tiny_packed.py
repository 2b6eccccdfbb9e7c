"""Tiny transformers whose latents lie by index in a packed sequence, or query among the keys of other tokens."""

from __future__ import annotations

import torch

from dit_accel.patches.reasons import NO_LATENTS
from tests.tiny_models import Inputs, TinyModel, key_mask, randn, time_of

TEXT, SOUND = 9, 7
CONDITION, VIDEO = (1, 4, 5), (3, 12, 14)


def _raster(grid: tuple[int, int, int], time: float) -> torch.Tensor:
    """(time, row, column) of each token, times a latent frame apart; [F * H * W, 3]."""
    frames, height, width = grid
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in (frames, height, width)))
    return places * torch.tensor([0.25, 1.0, 1.0]) + torch.tensor([time, 0.0, 0.0])


def _packed(generator: torch.Generator) -> Inputs:
    condition, video = _raster(CONDITION, 100.0), _raster(VIDEO, float(TEXT))
    text = torch.stack([torch.arange(TEXT, dtype=torch.float64), *torch.zeros(2, TEXT, dtype=torch.float64)], 1)
    sound = torch.stack([torch.arange(SOUND) / 3 + TEXT, *torch.zeros(2, SOUND, dtype=torch.float64)], 1)
    # text, condition, sound, video
    places = torch.cat([text, condition, sound, video])
    starts = torch.tensor([0, TEXT, TEXT + len(condition), TEXT + len(condition) + SOUND])
    rows = torch.cat([starts[1] + torch.arange(len(condition)), starts[3] + torch.arange(len(video))])
    tags = torch.ones(len(places), dtype=torch.long)
    tags[rows], tags[starts[2] : starts[3]] = 0, 2
    return {
        "hidden_states": randn(generator, 1, len(rows), 4),
        "audio_hidden_states": randn(generator, 1, SOUND, 4),
        "encoder_hidden_states": randn(generator, 1, TEXT, 16),
        "timestep": torch.tensor([0.5, 0.9], dtype=torch.float64),
        "timestep_indices": (tags != 0).long(),
        "token_tags": tags,
        "position_ids": places,
        "video_indices": rows,
        "audio_indices": torch.arange(SOUND) + starts[2],
        "text_indices": torch.arange(TEXT),
    }


def _omnigen(generator: torch.Generator) -> Inputs:
    """A prompt, causal, then the time token and the image, which see all but the padding before the prompt."""
    length = TEXT + 1 + 168
    mask = torch.ones(length, length, dtype=torch.float64).tril()
    mask[TEXT:] = 1
    mask[:, :2] = 0
    mask[:2, :2] = torch.eye(2)
    return {
        "hidden_states": randn(generator, 1, 4, 24, 28),
        "timestep": time_of(0.5),
        "input_ids": torch.arange(TEXT)[None],
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask[None],
        "position_ids": torch.arange(length)[None],
    }


def _ideogram4(generator: torch.Generator) -> Inputs:
    """Two prompts of other lengths, padded at their begin, then an image in each."""
    length, given = TEXT + 168, []
    for padding in (2, 0):
        places = torch.zeros(length, 3, dtype=torch.long)
        places[padding:TEXT] = torch.arange(TEXT - padding)[:, None]
        places[TEXT:] = _raster((1, 12, 14), 0.0).long() + 65536
        segments, roles = torch.ones(length, dtype=torch.long), torch.full((length,), 2)
        segments[:padding], roles[:padding], roles[padding:TEXT] = -1, 0, 3
        given.append((places, segments, roles))
    places, segments, roles = (torch.stack(part) for part in zip(*given, strict=True))
    return {
        "hidden_states": randn(generator, 2, length, 4),
        "timestep": time_of(0.5).expand(2),
        "encoder_hidden_states": randn(generator, 2, length, 16),
        "position_ids": places,
        "segment_ids": segments,
        "indicator": roles,
    }


def _cosmos3(generator: torch.Generator) -> Inputs:
    """A prompt, a video, and its sound."""
    number = 3 * 12 * 14
    rows = TEXT + torch.arange(number)
    places = torch.arange(TEXT + number + SOUND, dtype=torch.float64).expand(3, -1).clone()
    places[:, TEXT : TEXT + number] = _raster(VIDEO, float(TEXT)).T
    return {
        "input_ids": torch.arange(TEXT),
        "text_indexes": torch.arange(TEXT),
        "position_ids": places,
        "und_len": TEXT,
        "sequence_length": TEXT + number + SOUND,
        "vision_tokens": [randn(generator, 1, 4, 3, 24, 28)],
        "vision_token_shapes": [VIDEO],
        "vision_sequence_indexes": rows,
        "vision_mse_loss_indexes": rows,
        "vision_timesteps": torch.full((number,), 500.0, dtype=torch.float64),
        "vision_noisy_frame_indexes": [torch.arange(3)],
        "sound_tokens": [randn(generator, 4, SOUND)],
        "sound_token_shapes": [(SOUND, 1, 1)],
        "sound_sequence_indexes": TEXT + number + torch.arange(SOUND),
        "sound_mse_loss_indexes": TEXT + number + torch.arange(SOUND),
        "sound_timesteps": torch.full((SOUND,), 500.0, dtype=torch.float64),
        "sound_noisy_frame_indexes": [torch.arange(SOUND)],
    }


def qwen_image21(generator: torch.Generator) -> Inputs:
    """A prompt of four tokens, an image of 4 x 6 tokens to edit, five more of the prompt, and the image."""
    slots = torch.cat([torch.zeros(4), torch.ones(6), torch.zeros(5), torch.ones(42)]).bool()[None]
    return {
        "hidden_states": randn(generator, 1, 24 + 168, 4),
        "encoder_hidden_states": randn(generator, 1, 4 + 6 + 5, 16),
        "encoder_hidden_states_mask": key_mask(4 + 6 + 5, 2),
        "timestep": time_of(0.5),
        "img_shapes": [[(1, 4, 6), (1, 12, 14)]],
        "img_mask": slots,
    }


PACKED_MODELS = {
    "cosmos3": TinyModel(
        kind="Cosmos3OmniTransformer",
        config={
            "head_dim": 16,
            "hidden_size": 32,
            "intermediate_size": 32,
            "latent_channel": 4,
            "patch_latent_dim": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 2,
            "rope_axes_dim": [4, 2, 2],
            "sound_gen": True,
            "sound_dim": 4,
            "vocab_size": 32,
        },
        inputs=_cosmos3,
        grid=VIDEO,
        start=TEXT,
        seq_len=TEXT + 504 + SOUND,
        queries=(TEXT, 504 + SOUND),
        latents="vision_tokens",
        patch=(1, 2, 2),
        aside=frozenset(("causal attention",)),
    ),
    "qwen-image-2.1": TinyModel(
        kind="QwenImage21Transformer2DModel",
        config={
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "context_in_dim": 16,
            "axes_dims_rope": (4, 6, 6),
        },
        inputs=qwen_image21,
        grid=(1, 12, 14),
        start=9 + 24,
        seq_len=9 + 24 + 168,
        queries=(9 + 24, 168),
        axes="bsc",
        offset=24,
        unread=9 + 24,
        aside=frozenset((NO_LATENTS,)),
    ),
    "ideogram4": TinyModel(
        kind="Ideogram4Transformer2DModel",
        config={
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "adaln_dim": 16,
            "llm_features_dim": 16,
            "mrope_section": (4, 2, 2),
        },
        inputs=_ideogram4,
        grid=(1, 12, 14),
        start=TEXT,
        seq_len=TEXT + 168,
        axes="bsc",
        offset=TEXT,
        unread=TEXT,
    ),
    "omnigen": TinyModel(
        kind="OmniGenTransformer2DModel",
        config={
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 100,
            "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
            "pos_embed_max_size": 32,
        },
        inputs=_omnigen,
        grid=(1, 12, 14),
        start=TEXT + 1,
        seq_len=TEXT + 1 + 168,
        axes="bchw",
        patch=(1, 2, 2),
    ),
    "minimax-h3": TinyModel(
        kind="MiniMaxH3Transformer3DModel",
        config={
            "in_channels": 4,
            "patch_size": (1, 1, 1),
            "audio_in_channels": 4,
            "hidden_size": 32,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "ffn_dim": 32,
            "text_dim": 16,
            "freq_dim": 16,
            "time_embed_hidden_dim": 16,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        inputs=_packed,
        grid=VIDEO,
        start=TEXT + 20 + SOUND,
        seq_len=TEXT + 20 + SOUND + 504,
        axes="bsc",
        offset=20,
    ),
    "prx": TinyModel(
        kind="PRXTransformer2DModel",
        config={
            "in_channels": 4,
            "context_in_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [8, 8],
        },
        inputs=lambda generator: {
            "hidden_states": randn(generator, 1, 4, 24, 28),
            "encoder_hidden_states": randn(generator, 1, 9, 16),
            "timestep": time_of(0.5),
            "attention_mask": key_mask(9, 3),
        },
        grid=(1, 12, 14),
        start=9,
        seq_len=9 + 168,
        queries=(9, 168),
        axes="bchw",
        patch=(1, 2, 2),
    ),
    "nucleus-moe": TinyModel(
        kind="NucleusMoEImageTransformer2DModel",
        config={
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (4, 6, 6),
            "moe_enabled": False,
        },
        inputs=lambda generator: {
            "hidden_states": randn(generator, 1, 168, 16),
            "img_shapes": [(1, 12, 14)],
            "encoder_hidden_states": randn(generator, 1, 9, 16),
            "encoder_hidden_states_mask": key_mask(9, 3),
            "timestep": time_of(0.5),
        },
        grid=(1, 12, 14),
        seq_len=168 + 9,
        queries=(0, 168),
        axes="bsc",
    ),
}
