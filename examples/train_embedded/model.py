"""Builds the parts of the embedded pipeline and puts them together."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from captions import parse_words, vocabulary
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
SPECIAL_TOKENS = (PAD, END, UNKNOWN)
TEXT_TOKENS = 512  # WanPipeline pads prompt embeddings to this length with zeros and attends to all of them
CAPTION_TOKENS = 24
TIME_SHIFT = 3.0


def token_ids() -> dict[str, int]:
    """Word to id: the special tokens first, then the grammar's words in order."""
    return {word: index for index, word in enumerate((*SPECIAL_TOKENS, *vocabulary()))}


def encode_words(text: str, ids: dict[str, int]) -> list[int]:
    """What the tokenizer gives for `text`, without its cost."""
    unknown = ids[UNKNOWN]
    return [*[ids.get(word, unknown) for word in parse_words(text)][: CAPTION_TOKENS - 1], ids[END]]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer of the grammar; every other word becomes <unk>."""
    ids = token_ids()
    core = Tokenizer(models.WordLevel(vocab=ids, unk_token=UNKNOWN))
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(behavior="removed")]
    )
    core.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, ids[END])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token=UNKNOWN, pad_token=PAD, eos_token=END, model_max_length=TEXT_TOKENS
    )


def build_text_encoder() -> UMT5EncoderModel:
    """Two layers of 128 channels; trained together with the transformer."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(token_ids()),
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def build_transformer(layers: int = 8, heads: int = 4, head_dim: int = 64, patch: int = 1) -> WanTransformer3DModel:
    """The denoiser. A patch is 1 x `patch` x `patch` latents.

    With patches of 1, 29 frames of 192 x 192 pixels are 8 x 24 x 24 = 4608 tokens; with patches of 2, 81 frames of
    832 x 480 are 21 x 30 x 52 = 32760.
    """
    transformer = WanTransformer3DModel(
        patch_size=(1, patch, patch),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=16,
        out_channels=16,
        text_dim=128,
        freq_dim=256,
        ffn_dim=4 * heads * head_dim,
        num_layers=layers,
        rope_max_seq_len=64,
    )
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def prompt_embeddings(encoder: UMT5EncoderModel, ids: torch.Tensor, length: int = TEXT_TOKENS) -> torch.Tensor:
    """Embeds padded ids [n, CAPTION_TOKENS] as WanPipeline does: zeros after each caption, up to `length`."""
    mask = ids != 0
    hidden = encoder(ids, mask.long()).last_hidden_state * mask.unsqueeze(-1)
    return torch.nn.functional.pad(hidden, (0, 0, 0, length - ids.shape[1]))


def assemble(
    transformer: WanTransformer3DModel, text_encoder: UMT5EncoderModel, vae: AutoencoderKLWan, shift: float = TIME_SHIFT
) -> WanPipeline:
    """The stock pipeline of the parts."""
    return WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        transformer=transformer,
    )


def caption_rows(texts: list[str], rng: random.Random, ids: dict[str, int], length: int) -> torch.Tensor:
    """Token ids [n, length] of captions for a training step, zeros behind each.

    One caption in ten is dropped for guidance; a few words are unknown, so that unknown words do no harm.
    """
    rows = []
    for text in texts:
        row = encode_words("" if rng.random() < 0.1 else text, ids)
        if len(row) > 1 and rng.random() < 0.05:
            row.insert(rng.randrange(len(row)), ids[UNKNOWN])
        rows.append((row + [0] * length)[:length])
    return torch.tensor(rows)


def load_autoencoder(folder: Path, device: torch.device | str) -> AutoencoderKLWan:
    """The trained autoencoder in float32, for encoding and decoding."""
    vae: AutoencoderKLWan = AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32)
    vae = vae.to(device).eval().requires_grad_(False)
    for parameter in vae.parameters():
        if parameter.dim() == 5 and parameter.is_cuda:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    return vae
