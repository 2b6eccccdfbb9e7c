"""Whole pipelines around real architectures with random weights: text encoders, scheduler, autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .architectures import Architecture, materialise


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder of transformers, and what a pipeline gives it.

    Attributes:
        model, config: names of its class and of its config's class.
        settings: of the config, as the published checkpoint has them.
        tokens: of one prompt, padding included.
    """

    model: str
    config: str
    settings: Mapping[str, Any]
    tokens: int

    def build(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The encoder with random weights, made directly on the device."""
        import transformers
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            model: nn.Module = getattr(transformers, self.model)(getattr(transformers, self.config)(**self.settings))
        materialise(model, dtype, device)
        return model.eval().requires_grad_(False)

    def ids(self, device: torch.device) -> torch.Tensor:
        """Token ids of a prompt, [1, tokens]."""
        return torch.arange(1, self.tokens + 1, device=device)[None] % self.settings["vocab_size"]


@dataclass(frozen=True)
class WholePipeline:
    """What surrounds a transformer in its pipeline.

    Attributes:
        pipeline, autoencoder, scheduler: names of classes of diffusers.
        encoders: text encoders.
        prompts: that a run encodes: 2 where guidance has a negative one.
        embeddings: arguments of the call in place of prompts, in a dtype and on a device.
        tiled: whether users decode in tiles at the usual sizes, for memory.
        shift: of the scheduler's noise levels.
        autoencoder_dtype: in which diffusers' own example decodes, on a GPU.
        modules: names under which the pipeline holds no text encoder or tokenizer.
    """

    pipeline: str
    autoencoder: str
    encoders: tuple[TextEncoder, ...]
    prompts: int
    embeddings: Callable[[torch.dtype, torch.device], dict[str, Any]]
    modules: tuple[str, ...]
    scheduler: str = "FlowMatchEulerDiscreteScheduler"
    tiled: bool = False
    shift: float = 5.0
    autoencoder_dtype: torch.dtype = torch.float32

    def build(self, transformer: nn.Module, autoencoder: nn.Module) -> Any:
        """The pipeline without text encoders: it takes embeddings."""
        import diffusers

        pipe = getattr(diffusers, self.pipeline)(
            transformer=transformer,
            vae=autoencoder,
            scheduler=getattr(diffusers, self.scheduler)(shift=self.shift),
            **dict.fromkeys(self.modules),
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def build_autoencoder(self, device: torch.device) -> nn.Module:
        """The autoencoder with random weights, made on the device; tiled where users tile it."""
        import diffusers
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            model: Any = getattr(diffusers, self.autoencoder)()
        # Convolutions in 16 bits crawl on a CPU.
        materialise(model, torch.float32 if device.type == "cpu" else self.autoencoder_dtype, device)
        if self.tiled:
            model.enable_tiling()
        found: nn.Module = model.eval().requires_grad_(False)
        return found


def _random(dtype: torch.dtype, device: torch.device, *shape: int) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(shape, dtype=dtype, device=device, generator=generator)


def _wan(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    positive, negative = _random(dtype, device, 2, 512, 4096).chunk(2)
    return {"prompt_embeds": positive, "negative_prompt_embeds": negative, "guidance_scale": 5.0}


def _hunyuan_video(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    mask = torch.zeros(1, 256, dtype=dtype, device=device)
    mask[:, :64] = 1
    return {
        "prompt_embeds": _random(dtype, device, 1, 256, 4096),
        "pooled_prompt_embeds": _random(dtype, device, 1, 768),
        "prompt_attention_mask": mask,
        "guidance_scale": 6.0,
    }


_UMT5_XXL = TextEncoder(
    "UMT5EncoderModel",
    "UMT5Config",
    {
        "vocab_size": 256384,
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_heads": 64,
        "num_layers": 24,
        "feed_forward_proj": "gated-gelu",
    },
    tokens=512,
)
# The prompt stands behind a template of 95 tokens.
_LLAMA_8B = TextEncoder(
    "LlamaModel",
    "LlamaConfig",
    {
        "vocab_size": 128320,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    tokens=351,
)
_CLIP_L = TextEncoder(
    "CLIPTextModel",
    "CLIPTextConfig",
    {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    tokens=77,
)

_WAN = WholePipeline("WanPipeline", "AutoencoderKLWan", (_UMT5_XXL,), 2, _wan, ("tokenizer", "text_encoder"))
WHOLE_PIPELINES: dict[str, WholePipeline] = {
    "wan2.1-1.3b": _WAN,
    "wan2.1-14b": _WAN,
    "hunyuanvideo": WholePipeline(
        "HunyuanVideoPipeline",
        "AutoencoderKLHunyuanVideo",
        (_LLAMA_8B, _CLIP_L),
        1,
        _hunyuan_video,
        ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"),
        tiled=True,
        shift=7.0,
        autoencoder_dtype=torch.float16,
    ),
}
"""By the name of their architecture."""


def whole_pipeline(architecture: Architecture) -> WholePipeline:
    """What surrounds an architecture.

    Raises:
        ValueError: its pipeline is not known.
    """
    if architecture.name not in WHOLE_PIPELINES:
        raise ValueError(
            f"Whole runs are known of {', '.join(WHOLE_PIPELINES)}, got {architecture.name}; "
            "its forward can be timed without --pipeline."
        )
    return WHOLE_PIPELINES[architecture.name]
