"""Real transformer architectures with random weights, built where they run: nothing is downloaded.

For measuring speed: the time of a forward depends on shapes and dtypes, not on what the weights have learned.
Configs are those of the published checkpoints, as diffusers' conversion scripts and class defaults give them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Middle of the trajectory, on the scale that video pipelines pass.
TIMESTEP = 500.0


@dataclass(frozen=True)
class Latents:
    """Latents of one forward: batch, latent frames, height and width."""

    batch: int
    frames: int
    height: int
    width: int
    dtype: torch.dtype
    device: torch.device

    def noise(self, *shape: int) -> torch.Tensor:
        """Standard normal values, in the model's dtype."""
        return torch.randn(self.batch, *shape, dtype=self.dtype, device=self.device)

    def full(self, value: float, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One value for each sample."""
        return torch.full((self.batch,), value, dtype=dtype or self.dtype, device=self.device)


@dataclass(frozen=True, eq=False)
class Architecture:
    """One published transformer.

    Attributes:
        name: as given on the command line.
        transformer: its class in diffusers.
        config: arguments of the class.
        depth: the arguments that count blocks.
        inputs: the other arguments of a forward, as the model's pipeline passes them.
        size: default pixel width, height and frames.
        vae: pixels per latent: frames, and height and width.
        multiple: what pixel width and height must be multiples of.
        is_video: whether it makes videos.
        patch: latents per token, in height and in width.
    """

    name: str
    transformer: str
    config: Mapping[str, Any]
    depth: tuple[str, ...]
    inputs: Callable[[nn.Module, Latents], dict[str, Any]]
    size: tuple[int, int, int]
    vae: tuple[int, int] = (4, 8)
    multiple: int = 16
    is_video: bool = True
    patch: int = 2

    def latent_size(self, width: int, height: int, frames: int) -> tuple[int, int, int]:
        """Latent frames, height and width of a clip of this pixel size.

        Raises:
            ValueError: a size that the model does not take.
        """
        if width < 1 or height < 1 or width % self.multiple or height % self.multiple:
            raise ValueError(
                f"{self.name} needs width and height in multiples of {self.multiple}, got {width}x{height}."
            )
        temporal, spatial = self.vae
        if frames < 1 or (frames - 1) % temporal:
            raise ValueError(
                f"{self.name} needs a multiple of {temporal} frames plus one, such as {self.size[2]}, got {frames}."
            )
        if not self.is_video and frames != 1:
            raise ValueError(f"{self.name} makes images: frames must be 1, got {frames}.")
        return (frames - 1) // temporal + 1, height // spatial, width // spatial

    def tokens(self, width: int, height: int, frames: int) -> int:
        """Latent tokens of a clip of this pixel size."""
        latent_frames, latent_height, latent_width = self.latent_size(width, height, frames)
        return latent_frames * (latent_height // self.patch) * (latent_width // self.patch)

    def build(self, *, dtype: torch.dtype, device: torch.device, layers: int | None = None) -> nn.Module:
        """The transformer with random weights, made directly on the device, ready to run.

        Args:
            layers: blocks in all, to measure a shallower model; double- and single-stream blocks keep the
                model's own ratio. None: all of them.

        Raises:
            ValueError: more layers than the model has, or fewer than one of each kind.
        """
        import diffusers
        from accelerate import init_empty_weights

        config = dict(self.config) | self._depths(layers)
        with init_empty_weights(include_buffers=False):
            model: nn.Module = getattr(diffusers, self.transformer)(**config)
        _materialise(model, dtype, device)
        return model.eval().requires_grad_(False)

    def make_inputs(
        self,
        model: nn.Module,
        *,
        width: int,
        height: int,
        frames: int,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> dict[str, Any]:
        """Arguments of a forward for a clip of this pixel size, the same values at every call.

        Raises:
            ValueError: a size that the model does not take.
        """
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}.")
        latents = Latents(batch, *self.latent_size(width, height, frames), dtype, device)
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            return {**self.inputs(model, latents), "return_dict": False}

    @property
    def blocks(self) -> int:
        """Blocks of the full model."""
        return sum(self.config[name] for name in self.depth)

    def _depths(self, layers: int | None) -> dict[str, int]:
        if layers is None:
            return {}
        if not len(self.depth) <= layers <= self.blocks:
            raise ValueError(f"{self.name} takes {len(self.depth)} to {self.blocks} layers, got {layers}.")
        first = self.depth[0]
        if len(self.depth) == 1:
            return {first: layers}
        share = min(max(round(layers * self.config[first] / self.blocks), 1), layers - 1)
        return {first: share, self.depth[1]: layers - share}


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring parameters to ``dtype``, except those that ``from_pretrained`` keeps in float32 too."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(_dtype_of(model, name, dtype))


def _dtype_of(model: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    return torch.float32 if any(part in name.split(".") for part in kept) else dtype


def _materialise(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give every parameter its memory and a cheap random value that keeps activations at unit scale."""
    generator = torch.Generator(device).manual_seed(0)
    for path, module in model.named_modules():
        for name, empty in module.named_parameters(recurse=False):
            full_name = f"{path}.{name}"
            value = torch.empty(empty.shape, dtype=_dtype_of(model, full_name, dtype), device=device)
            if value.dim() > 1:
                # A matrix or kernel by its fan-in; a modulation table [1, n, dim] likewise.
                value.normal_(std=value[0].numel() ** -0.5, generator=generator)
            else:
                value.fill_(0.0 if name == "bias" else 1.0)
            setattr(module, name, nn.Parameter(value))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _wan(_model: nn.Module, latents: Latents) -> dict[str, Any]:
    return {
        "hidden_states": latents.noise(16, latents.frames, latents.height, latents.width),
        "timestep": latents.full(TIMESTEP, torch.float32),
        "encoder_hidden_states": latents.noise(512, 4096),
    }


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


def _flux(_model: nn.Module, latents: Latents) -> dict[str, Any]:
    # Two latents by two make a token.
    height, width = latents.height // 2, latents.width // 2
    ids = torch.zeros(height, width, 3, dtype=latents.dtype, device=latents.device)
    ids[..., 1] += torch.arange(height, device=latents.device)[:, None]
    ids[..., 2] += torch.arange(width, device=latents.device)
    return {
        "hidden_states": latents.noise(height * width, 64),
        "encoder_hidden_states": latents.noise(512, 4096),
        "pooled_projections": latents.noise(768),
        "timestep": latents.full(TIMESTEP / 1000),
        "img_ids": ids.view(-1, 3),
        "txt_ids": torch.zeros(512, 3, dtype=latents.dtype, device=latents.device),
        "guidance": latents.full(3.5, torch.float32),
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

_KNOWN = (
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
    Architecture(
        name="flux-dev",
        transformer="FluxTransformer2DModel",
        config={
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
        },
        depth=("num_layers", "num_single_layers"),
        inputs=_flux,
        size=(1024, 1024, 1),
        is_video=False,
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
        vae=(8, 32),
        multiple=32,
        patch=1,
    ),
)
ARCHITECTURES: dict[str, Architecture] = {architecture.name: architecture for architecture in _KNOWN}


def architecture(name: str) -> Architecture:
    """A known architecture.

    Raises:
        ValueError: unknown name.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"Unknown architecture {name!r}; known are {', '.join(ARCHITECTURES)}.")
    return ARCHITECTURES[name]
