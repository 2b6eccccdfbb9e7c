"""A small Wan pipeline with random weights, offline: text really goes in, noise-like frames come out.

It has every part of the real one (tokenizer, UMT5 text encoder, Wan transformer, causal video VAE), so that
the whole path can be run and timed on a laptop. Its pictures mean nothing.
"""

from __future__ import annotations

import string
from typing import Any

import torch

from .architectures import cast

TEXT_DIM = 64


def build_random_wan(dtype: torch.dtype | None = None) -> Any:
    """A ``WanPipeline`` with random weights, the same on every call, on the CPU.

    Text encoder and transformer come in ``dtype`` (float32 if None), the autoencoder in float32.
    """
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = _character_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # diffusers and transformers models are modules, which their lazy imports hide from a type checker.
        text_encoder: Any = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(tokenizer),
                d_model=TEXT_DIM,
                d_kv=16,
                d_ff=128,
                num_heads=4,
                num_layers=2,
                dropout_rate=0.0,
            )
        )
        transformer: Any = WanTransformer3DModel(
            # One latent a token: thousands of tokens from few pixels, which the autoencoder decodes quickly.
            patch_size=(1, 1, 1),
            num_attention_heads=4,
            attention_head_dim=64,
            in_channels=16,
            out_channels=16,
            text_dim=TEXT_DIM,
            freq_dim=256,
            ffn_dim=512,
            num_layers=3,
        )
        vae: Any = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    if dtype is not None:
        cast(transformer, dtype)
        text_encoder.to(dtype)
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _character_tokenizer() -> Any:
    """One token a character: any prompt counts, and no vocabulary has to be fetched."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>"]
    letters = string.ascii_lowercase + string.digits + string.punctuation + " "
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )
