"""What an architecture is: a class of diffusers with a published config, its sizes, and the inputs of a forward."""

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


@dataclass(frozen=True)
class Clip:
    """How an autoencoder makes latent frames of pixel frames: some at the start, then some for each chunk.

    Attributes:
        chunk: pixel frames of a chunk.
        chunk_latents: its latent frames.
        first: pixel frames of the start.
        first_latents: its latent frames.
    """

    chunk: int
    chunk_latents: int = 1
    first: int = 1
    first_latents: int = 1

    def latent_frames(self, frames: int) -> int | None:
        """Latent frames; None where the frames are no start and whole chunks."""
        chunks, rest = divmod(frames - self.first, self.chunk)
        return None if chunks < 0 or rest else self.first_latents + chunks * self.chunk_latents


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
        clip: how pixel frames become latent frames.
        stride: pixels per latent, in height and in width.
        multiple: what pixel width and height must be multiples of.
        is_video: whether it makes videos.
        patch: latents per token, in height and in width.
        references: images beside the one that is made, of its size.
    """

    name: str
    transformer: str
    config: Mapping[str, Any]
    depth: tuple[str, ...]
    inputs: Callable[[nn.Module, Latents], dict[str, Any]]
    size: tuple[int, int, int]
    clip: Clip = Clip(4)
    stride: int = 8
    multiple: int = 16
    is_video: bool = True
    patch: int = 2
    references: int = 0

    def latent_size(self, width: int, height: int, frames: int) -> tuple[int, int, int]:
        """Latent frames, height and width of a clip of this pixel size.

        Raises:
            ValueError: a size that the model does not take.
        """
        if width < 1 or height < 1 or width % self.multiple or height % self.multiple:
            raise ValueError(
                f"{self.name} needs width and height in multiples of {self.multiple}, got {width}x{height}."
            )
        if not self.is_video and frames != 1:
            raise ValueError(f"{self.name} makes images: frames must be 1, got {frames}.")
        latent_frames = self.clip.latent_frames(frames)
        if latent_frames is None:
            rest = "one" if self.clip.first == 1 else self.clip.first
            raise ValueError(
                f"{self.name} needs a multiple of {self.clip.chunk} frames plus {rest}, such as {self.size[2]}, "
                f"got {frames}."
            )
        return latent_frames, height // self.stride, width // self.stride

    def tokens(self, width: int, height: int, frames: int) -> int:
        """Latent tokens of a forward at this pixel size, those of references with them."""
        latent_frames, latent_height, latent_width = self.latent_size(width, height, frames)
        return (1 + self.references) * latent_frames * (latent_height // self.patch) * (latent_width // self.patch)

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
        materialise(model, dtype, device)
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


def first_output(result: Any) -> torch.Tensor:
    """What a forward made of its latents, as one tensor: the first of its outputs, whose samples may be a list."""
    output = result[0]
    return torch.stack(output) if isinstance(output, list) else output


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring parameters to ``dtype``, except those that ``from_pretrained`` keeps in float32 too."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(_dtype_of(model, name, dtype))


def _dtype_of(model: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    return torch.float32 if any(part in name.split(".") for part in kept) else dtype


def materialise(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
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
