"""Builds the parts of the image pipeline: stock FLUX Kontext, which makes images and edits one."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
from model import CAPTION_TOKENS, TIME_SHIFT, build_tokenizer, token_ids
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, UMT5EncoderModel

WIDTH = 128  # of both text encoders
PROMPT_TOKENS = 64  # what captions are padded to; the pipeline's own default, 512, would double an image's tokens


def build_image_transformer(layers: int = 3, single_layers: int = 6, heads: int = 2) -> FluxTransformer2DModel:
    """The denoiser: 2 x 2 latents a token, so an image of 1024 x 1024 pixels is 64 x 64 = 4096 tokens."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=128,
        num_attention_heads=heads,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(16, 56, 56),
    )
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def build_pooled_encoder() -> CLIPTextModel:
    """One layer; FLUX takes its state at the end of a prompt into the modulation."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(token_ids()),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=CAPTION_TOKENS,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )
    )


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[n, 16, 1, h, w] as the pipeline packs it: [n, h / 2 * w / 2, 64]."""
    n, c, _, h, w = latents.shape
    return FluxKontextPipeline._pack_latents(latents, n, c, h, w)


def unpack(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack`."""
    h, w = like.shape[-2:]
    return FluxKontextPipeline._unpack_latents(tokens, 8 * h, 8 * w, 8).unsqueeze(2)


def positions(latents: torch.Tensor, number: int) -> torch.Tensor:
    """(image, row, column) of each token: image 0 is made, 1 is the reference."""
    h, w = latents.shape[-2:]
    ids = FluxKontextPipeline._prepare_latent_image_ids(1, h // 2, w // 2, latents.device, torch.float32)
    ids[:, 0] = number
    return ids


def assemble_image(
    transformer: FluxTransformer2DModel, text_encoder: CLIPTextModel, text_encoder_2: UMT5EncoderModel, vae: nn.Module,
    shift: float = TIME_SHIFT,
) -> FluxKontextPipeline:  # fmt: skip
    """The stock pipeline of the parts."""
    short = build_tokenizer()
    short.model_max_length = CAPTION_TOKENS
    return FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=short,
        text_encoder_2=text_encoder_2,
        tokenizer_2=build_tokenizer(),
        transformer=transformer,
    )
