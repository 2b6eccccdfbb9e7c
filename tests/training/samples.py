"""Samples for tiny Wan pipelines, and settings of trainings that take seconds."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dit_accel import Recipe
from dit_accel.stages.compensate.linear import LinearBranch
from dit_accel.stages.select.pooled import Pooled
from dit_accel.training.samples import Sample
from tests.recipes import SMALL_TILES
from tests.tiny import TINY

SLA = Recipe(order=SMALL_TILES, select=Pooled(density=0.3, block=(32, 32)), compensate=LinearBranch())


def tiny_pipe(**changes: Any) -> Any:
    pipe = TINY["wan"].build(**changes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def samples(count: int = 6) -> list[Sample]:
    """Low-frequency latents (16 channels, 3 x 12 x 16) with random prompts: something to learn."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for index in range(count):
        small = torch.randn(1, 16, 1, 2, 2, generator=generator)
        latents = torch.nn.functional.interpolate(small, (3, 12, 16), mode="trilinear")
        prompt = torch.randn(1, 8, 32, generator=generator)
        made.append(Sample(f"sample-{index}", latents, 1000.0, {"encoder_hidden_states": prompt}))
    return made


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file may become larger than so many bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
