"""Text to video: `WanTransformer3DModel` and a small UMT5 that is trained with it."""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from typing import ClassVar

import torch
from captions import Scene, caption, sample_scene
from compose import render_clips
from concentration import attention_inputs, concentration_penalty, density, tile_masses, tile_tokens
from diffusers import WanTransformer3DModel
from model import CAPTION_TOKENS, build_text_encoder, build_transformer, caption_rows, prompt_embeddings, token_ids
from pool import Batch
from sprites import SpriteBank
from stages import Stage
from torch import nn
from transformers import UMT5EncoderModel


class VideoTask:
    """Renders clips, and predicts their velocity."""

    # Where a saved pipeline keeps each network.
    parts: ClassVar = {
        "transformer": ("transformer", WanTransformer3DModel),
        "text_encoder": ("text_encoder", UMT5EncoderModel),
    }

    def __init__(self, args: argparse.Namespace, bank: SpriteBank, device: torch.device) -> None:
        self.args, self.bank, self.device = args, bank, device
        self.transformer = build_transformer(args.layers, args.heads, args.head_dim, args.patch).to(device)
        self.text_encoder = build_text_encoder().to(device)
        self.networks: dict[str, nn.Module] = {"transformer": self.transformer, "text_encoder": self.text_encoder}
        self.ids = token_ids()
        # Running mean of each layer's density for 95 % of the attention mass, where the penalty looks at it.
        self.densities = torch.full((args.layers,), float("nan"), device=device)

    @property
    def blocks(self) -> list[nn.Module]:
        """What is compiled, one by one."""
        return list(self.transformer.blocks)

    def render(
        self, stage: Stage, count: int, rng: random.Random, textures: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, list[Scene], None]:
        scenes = [sample_scene(rng) for _ in range(count)]
        geometry = stage.geometry(self.args.clip_frames, self.args.size)
        clips, cover = render_clips(scenes, self.bank, geometry, rng, textures, stage.frames)
        return clips, cover, scenes, None

    def prepare(self, batch: Batch, _rng: random.Random, step: int) -> Batch:
        """Every so many steps first frames alone, which the causal encoder keeps separate."""
        every = self.args.image_every
        if every == 0 or step % every != every - 1:
            return batch
        return replace(batch, clean=batch.clean[:, :, :1], cover=batch.cover[:, :, :1])

    def words(self, batch: Batch, rng: random.Random) -> torch.Tensor:
        texts = [caption(scene, rng) for scene in batch.scenes]
        return caption_rows(texts, rng, self.ids, CAPTION_TOKENS).to(self.device, non_blocking=True)

    def velocity(
        self, noisy: torch.Tensor, sigma: torch.Tensor, words: torch.Tensor, _reference: None, text_tokens: int
    ) -> torch.Tensor:
        """What leads from clean to noise at [n] sigmas, as latents."""
        text = prompt_embeddings(self.text_encoder, words, text_tokens)
        return self.transformer(noisy, sigma * 1000, text, return_dict=False)[0]

    def concentrate(
        self, noisy: torch.Tensor, sigma: torch.Tensor, words: torch.Tensor, stage: Stage, share: float,
        rng: random.Random, noise: torch.Generator, samples: int = 3,
    ) -> None:  # fmt: skip
        """Adds the gradient of the concentration penalty of every layer, on a few samples and query tiles."""
        some = torch.randperm(len(noisy), generator=noise, device=self.device)[:samples]
        grid = (noisy.shape[2], noisy.shape[3], noisy.shape[4])
        count = grid[0] * grid[1] * grid[2] // 64
        tiles = torch.tensor(rng.sample(range(count), min(8, count)), device=self.device)
        order = tile_tokens(grid, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            with torch.no_grad():
                text = prompt_embeddings(self.text_encoder, words, stage.text_tokens)
            inputs = attention_inputs(self.transformer, noisy[some], sigma[some] * 1000, text[some])
            for layer, (query, key) in enumerate(inputs):
                masses = tile_masses(query, key, order, tiles)
                (self.args.concentration * concentration_penalty(masses, share)).backward()
                found, before = density(masses.detach()), self.densities[layer]
                self.densities[layer] = torch.where(before.isnan(), found, 0.98 * before + 0.02 * found)
