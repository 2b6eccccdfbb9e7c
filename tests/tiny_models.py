"""Tiny transformers alone, with random weights, and inputs of a known latent grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn

Grid = tuple[int, int, int]
Inputs = dict[str, Any]


@dataclass(frozen=True)
class TinyModel:
    """A transformer class, what its forward is given, and where its latents then lie.

    Attributes:
        kind: class name in diffusers.
        config: of a tiny one.
        inputs: of one forward, all random numbers from the generator.
        grid: latent frames, height and width in tokens.
        start: of the latents in an attention sequence.
        seq_len: tokens of an attention sequence.
        axes: of ``latents``, a letter each; "s" are packed tokens.
        patch: latent frames, rows and columns of a token.
        latents: name of the argument that holds them.
        offset: packed tokens before the grid.
        exact: whether a forward in float64 stays in it.
    """

    kind: str
    config: dict[str, Any]
    inputs: Callable[[torch.Generator], Inputs]
    grid: Grid
    seq_len: int
    start: int = 0
    axes: str = "bcfhw"
    patch: Grid = (1, 1, 1)
    latents: str = "hidden_states"
    offset: int = 0
    exact: bool = True
    prepare: Callable[[nn.Module], None] = lambda model: None

    def build(self) -> Any:
        torch.manual_seed(0)
        model = getattr(diffusers, self.kind)(**self.config).eval().double()
        # What training would have moved: gates and tables that begin at zero hide a layer.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.numel() and not bool(parameter.any()):
                    parameter.normal_(std=0.1)
        self.prepare(model)
        return model

    def given(self) -> Inputs:
        """The inputs of one forward, the same every time."""
        return self.inputs(torch.Generator().manual_seed(0))

    @torch.no_grad()
    def run(self, model: Any, given: Inputs | None = None) -> torch.Tensor:
        return torch.as_tensor(model(**self.given() if given is None else given, return_dict=False)[0])

    def nudged(self, place: Grid) -> Inputs:
        """The inputs with the latents of one token changed."""
        given = self.given()
        index: list[Any] = []
        for axis in self.axes:
            if axis == "s":
                f, h, w = place
                index.append(self.offset + (f * self.grid[1] + h) * self.grid[2] + w)
            elif axis in "fhw":
                size, at = self.patch["fhw".index(axis)], place["fhw".index(axis)]
                index.append(slice(at * size, (at + 1) * size))
            else:
                index.append(slice(None))
        held = given[self.latents]
        latents = held[0] if isinstance(held, list) else held
        latents[tuple(index)] += 1.0
        return given


def randn(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def key_mask(length: int, hidden: int, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    """``[1, length]`` with the last keys hidden."""
    return (torch.arange(length) < length - hidden)[None].to(dtype)


def _time(value: float = 500.0) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


def _hunyuan_15(g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, 1, 4, 2, 12, 7),
        "timestep": _time(),
        "encoder_hidden_states": randn(g, 1, 6, 16),
        "encoder_attention_mask": key_mask(6, 2, torch.float64),
        "encoder_hidden_states_2": randn(g, 1, 4, 8),
        "encoder_attention_mask_2": key_mask(4, 1, torch.float64),
        "image_embeds": torch.zeros(1, 3, 12, dtype=torch.float64),
    }


def _ltx2(g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, 1, 2 * 12 * 7 + 5, 4),
        "audio_hidden_states": randn(g, 1, 9, 4),
        "encoder_hidden_states": randn(g, 1, 16, 16),
        "audio_encoder_hidden_states": randn(g, 1, 16, 16),
        "encoder_attention_mask": key_mask(16, 4),
        "audio_encoder_attention_mask": key_mask(16, 4),
        "timestep": _time(),
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


def _text_to_video(channels: int, text: int = 16) -> Callable[[torch.Generator], Inputs]:
    def inputs(g: torch.Generator) -> Inputs:
        return {
            "hidden_states": randn(g, 1, channels, 2, 24, 14),
            "timestep": _time(),
            "encoder_hidden_states": randn(g, 1, 12, text),
        }

    return inputs


def _wan_animate(g: torch.Generator) -> Inputs:
    return _text_to_video(12)(g) | {
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

MODELS: dict[str, TinyModel] = {
    "hunyuan-1.5": TinyModel(
        "HunyuanVideo15Transformer3DModel",
        {
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
        },
        _hunyuan_15,
        (2, 12, 7),
        168 + 13,
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
        | _QK_NORM,
        _ltx2,
        (2, 12, 7),
        168 + 5,
        axes="bsc",
        exact=False,
    ),
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
        exact=False,
        **_GRID,
    ),
    "chronoedit": TinyModel(
        "ChronoEditTransformer3DModel",
        _WAN | _QK_NORM | {"rope_temporal_skip_len": 8},
        _text_to_video(4),
        seq_len=168,
        exact=False,
        **_GRID,
    ),
    "anyflow": TinyModel(
        "AnyFlowTransformer3DModel",
        _WAN | {"gate_value": 0.25, "deltatime_type": "r"},
        _anyflow,
        seq_len=168,
        axes="bfchw",
        exact=False,
        **_GRID,
    ),
    "skyreels": TinyModel(
        "SkyReelsV2Transformer3DModel",
        _WAN | _QK_NORM,
        _text_to_video(4),
        seq_len=168,
        exact=False,
        **_GRID,
    ),
}
