"""What each of two processes runs in the test of a command that shares sequences: Ulysses, with DDP or with FSDP2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator

from dit_accel.cli.main import app
from tests.training.two_shards import shard_on_cpus


@contextmanager
def norms_seen() -> Iterator[list[float]]:
    """Norms of the gradients that a training finds before it scales them: Adam does not mind their size."""
    found: list[float] = []
    clip = Accelerator.clip_grad_norm_

    def seen(self: Accelerator, *given: Any) -> Any:
        norm = clip(self, *given)
        found.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
        return norm

    Accelerator.clip_grad_norm_ = seen
    try:
        yield found
    finally:
        Accelerator.clip_grad_norm_ = clip


if __name__ == "__main__":
    kind, *arguments = sys.argv[1:]
    # diffusers divides by the number of accelerators, and a CPU has none.
    torch.accelerator.device_count = lambda: 2
    if kind == "fsdp":
        shard_on_cpus()
    with norms_seen() as found:
        app(["finetune", "random-wan", *arguments], standalone_mode=False)
    print("norms", *found)
