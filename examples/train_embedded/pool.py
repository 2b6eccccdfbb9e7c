"""A pool of rendered and encoded clips, renewed while training."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

import torch
from captions import Scene
from clip_autoencoder import encode_clip, latent_statistics
from compose import latent_cover
from diffusers import AutoencoderKLWan
from stages import Stage


class Rendered(Protocol):
    """Renders the chunk of a stage: clips and covers as `render_clips`, their scenes, and perhaps references."""

    def __call__(
        self, stage: Stage, count: int, rng: random.Random, textures: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, list[Scene], torch.Tensor | None]: ...


@dataclass(frozen=True)
class Batch:
    """Normalised latents [n, 16, t, h, w], where the subjects are [n, 1, t, h, w], the scenes, and references.

    A reference is the latents of a picture of which the clean one is an edit.
    """

    clean: torch.Tensor
    cover: torch.Tensor
    scenes: list[Scene]
    reference: torch.Tensor | None


class Encoder:
    """The autoencoder's normalised means, for clips on its device."""

    def __init__(self, vae: AutoencoderKLWan, device: torch.device) -> None:
        self.vae, self.device = vae, device
        self.mean, self.std = latent_statistics(vae, device)

    @torch.no_grad()
    def __call__(self, clips: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            mean = encode_clip(self.vae, clips.contiguous(memory_format=torch.channels_last_3d)).chunk(2, dim=1)[0]
        return (mean.float() - self.mean) / self.std


class LatentPool:
    """Encoded clips with their scenes; the oldest chunk makes room for the next.

    A chunk depends on the seed and its number alone, so that a run that goes on from a checkpoint finds the very pool
    that it left.

    Args:
        made: the chunks that were made before; those that the pool would hold are made again.
    """

    def __init__(
        self, render: Rendered, encode: Encoder, stage: Stage, latent_shape: tuple[int, int, int], chunk: int,
        seed: str, made: int = 0,
    ) -> None:  # fmt: skip
        self.render, self.encode, self.stage, self.chunk, self.seed = render, encode, stage, chunk, seed
        device = encode.device
        capacity = max(chunk, stage.capacity // chunk * chunk)
        self.kind = torch.bfloat16 if device.type == "cuda" else torch.float32
        shape = (stage.latent_frames, *latent_shape[1:])
        self.latents = torch.empty(capacity, 16, *shape, dtype=self.kind, device=device)
        self.cover = torch.empty(capacity, 1, *shape, dtype=self.kind, device=device)
        self.references: torch.Tensor | None = None
        self.scenes: list[Scene] = [Scene(0, None, 0, 0)] * capacity
        self.textures = torch.Generator(device)
        chunks = capacity // chunk
        self.made = max(0, made - chunks)
        while self.made < max(made, chunks):
            self.renew()

    @torch.no_grad()
    def renew(self) -> None:
        """Renders and encodes the next chunk over the oldest one."""
        rng = random.Random(f"{self.seed}/{self.made}")
        self.textures.manual_seed(rng.getrandbits(60))
        clips, cover, scenes, references = self.render(self.stage, self.chunk, rng, self.textures)
        first = self.made * self.chunk % len(self.scenes)
        where = slice(first, first + self.chunk)
        self.latents[where] = self.encode(clips).to(self.kind)
        self.cover[where] = latent_cover(cover).to(self.kind)
        if references is not None:
            if self.references is None:
                self.references = torch.empty_like(self.latents)
            self.references[where] = self.encode(references).to(self.kind)
        self.scenes[where] = scenes
        self.made += 1

    def batch(self, size: int, rng: random.Random) -> Batch:
        """`size` clips drawn by `rng`."""
        index = [rng.randrange(len(self.scenes)) for _ in range(size)]
        rows = torch.tensor(index, device=self.latents.device)
        reference = None if self.references is None else self.references[rows].float()
        return Batch(self.latents[rows].float(), self.cover[rows].float(), [self.scenes[i] for i in index], reference)
