"""Text to image, and edits of a reference: `FluxTransformer2DModel` and two small text encoders trained with it."""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from typing import ClassVar

import torch
from captions import BACKGROUNDS, COLOR_NAMES, SUBJECTS, Scene, caption, is_held_out, sample_scene
from compose import render_clips
from diffusers import FluxTransformer2DModel
from image_model import build_image_transformer, build_pooled_encoder, pack, positions, unpack
from model import CAPTION_TOKENS, build_text_encoder, caption_rows, token_ids
from pool import Batch
from sprites import SpriteBank
from stages import Stage
from torch import nn
from transformers import CLIPTextModel, UMT5EncoderModel

EDITS = ("subject", "place")


def edited(scene: Scene, edit: str, rng: random.Random, held_out: bool = False) -> Scene:
    """The scene with another colour or subject, or in another place; everything else stays where it was."""
    while True:
        if edit == "place":
            other = replace(scene, background=rng.randrange(len(BACKGROUNDS)))
        elif scene.color is not None and rng.random() < 0.5:
            other = replace(scene, color=rng.randrange(len(COLOR_NAMES)))
        else:
            subject = rng.randrange(len(SUBJECTS))
            color = rng.randrange(len(COLOR_NAMES)) if SUBJECTS[subject].hue is not None else None
            other = replace(scene, subject=subject, color=color)
        if other != scene and is_held_out(other.subject, other.background, other.motion) == held_out:
            return other


def render_edits(
    scenes: list[Scene], others: list[Scene], bank: SpriteBank, stage: Stage, side: int, rng: random.Random,
    textures: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Pictures of the other scenes with their covers, and of the scenes: the same moment, places and textures."""
    moment, seed, paint = rng.random(), rng.getrandbits(60), rng.getrandbits(60)
    made = []
    for group in (others, scenes):
        textures.manual_seed(paint)
        geometry = stage.geometry(29, side)
        made.append(render_clips(group, bank, geometry, random.Random(seed), textures, moment=moment))
    (after, cover), (before, _) = made
    return after, cover, before


class ImageTask:
    """Renders pairs of pictures, one an edit of the other, and predicts the velocity of the one that is made."""

    # Where a saved pipeline keeps each network.
    parts: ClassVar = {
        "transformer": ("transformer", FluxTransformer2DModel),
        "text_encoder": ("text_encoder_2", UMT5EncoderModel),
        "pooled_encoder": ("text_encoder", CLIPTextModel),
    }

    def __init__(self, args: argparse.Namespace, bank: SpriteBank, device: torch.device) -> None:
        self.args, self.bank, self.device = args, bank, device
        self.transformer = build_image_transformer(args.layers, args.single_layers, args.heads).to(device)
        self.text_encoder = build_text_encoder().to(device)
        self.pooled_encoder = build_pooled_encoder().to(device)
        self.networks: dict[str, nn.Module] = {
            "transformer": self.transformer,
            "text_encoder": self.text_encoder,
            "pooled_encoder": self.pooled_encoder,
        }
        self.ids = token_ids()

    @property
    def blocks(self) -> list[nn.Module]:
        """What is compiled, one by one."""
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    def render(
        self, stage: Stage, count: int, rng: random.Random, textures: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, list[Scene], torch.Tensor]:
        # One kind of edit a chunk: backgrounds are painted in groups, and stay the same where no group changes.
        edit = rng.choice(EDITS)
        scenes = [sample_scene(rng) for _ in range(count)]
        others = [edited(scene, edit, rng) for scene in scenes]
        after, cover, before = render_edits(scenes, others, self.bank, stage, self.args.size, rng, textures)
        return after, cover, others, before

    def prepare(self, batch: Batch, rng: random.Random, _step: int) -> Batch:
        """A step is of edits, or of images from text alone: the tokens of a batch are of one length."""
        return batch if rng.random() < self.args.edit_share else replace(batch, reference=None)

    def words(self, batch: Batch, rng: random.Random) -> torch.Tensor:
        texts = [caption(scene, rng, moving=False) for scene in batch.scenes]
        rows = caption_rows(texts, rng, self.ids, CAPTION_TOKENS)
        return rows.to(self.device, non_blocking=True)

    def velocity(
        self,
        noisy: torch.Tensor,
        sigma: torch.Tensor,
        words: torch.Tensor,
        reference: torch.Tensor | None,
        text_tokens: int,
    ) -> torch.Tensor:
        """What leads from clean to noise at [n] sigmas, as latents."""
        padded = nn.functional.pad(words, (0, text_tokens - words.shape[1]))
        # As the pipeline does: without a mask, so that padding is read too.
        text = self.text_encoder(padded).last_hidden_state
        pooled = self.pooled_encoder(words).pooler_output
        tokens, ids = pack(noisy), positions(noisy, 0)
        length = tokens.shape[1]
        if reference is not None:
            tokens = torch.cat([tokens, pack(reference)], dim=1)
            ids = torch.cat([ids, positions(reference, 1)])
        output = self.transformer(
            hidden_states=tokens,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=sigma,
            img_ids=ids,
            txt_ids=torch.zeros(text_tokens, 3, device=self.device),
            return_dict=False,
        )[0]
        return unpack(output[:, :length], noisy)
