"""Pipelines of a moment that take a prompt: one makes videos, the other images."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from diffusers import FluxPipeline

from dit_accel.pipelines.call_defaults import WanPipeline
from dit_accel.pipelines.random_wan import build_random_wan
from dit_accel.pipelines.settings import Settings
from tests.tiny import TINY

SETTINGS = Settings(width=64, height=64, frames=5, steps=3, guidance=1.0)


def videos() -> Any:
    return WanPipeline.of(build_random_wan(torch.float32), SETTINGS)


class PromptedFlux(FluxPipeline):
    """Embeddings drawn for the words of a prompt, in place of a text encoder."""

    def encode_prompt(self, prompt: Any = None, *_: Any, **__: Any) -> Any:
        words = prompt if isinstance(prompt, str) else prompt[0]
        generator = torch.Generator().manual_seed(zlib.crc32(words.encode()))
        drawn = torch.randn(1, 16, 32, generator=generator), torch.randn(1, 32, generator=generator)
        return *drawn, torch.zeros(16, 3)


def images() -> Any:
    pipe = TINY["flux"].build()
    pipe.__class__ = PromptedFlux
    return pipe
