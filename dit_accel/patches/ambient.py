"""What the hooks of a running transformer tell the attention call inside it.

diffusers' processors call attention through a module-level symbol that carries no identity, so the hooks
publish
it beside the call: which layer this is, and where the latent tokens are.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch


class LatentTokens(NamedTuple):
    """What a family reads from the arguments of a transformer's forward. One of grid and ids is given.

    Attributes:
        grid: latent frames, height and width in tokens; empty when only ``ids`` can tell.
        tokens: tokens of the latent stream, references behind the grid included.
        ids: position ids ``[tokens, 3]`` (reference, row, column) of image models that pass no size. They are
            read when attention runs, not while a graph is traced.
    """

    grid: tuple[int, ...]
    tokens: int
    ids: torch.Tensor | None = None


class Eager(threading.local):
    """Ambience of eager code: one per thread, since pipelines may run side by side."""

    def __init__(self) -> None:
        self.layer: torch.Tensor | None = None
        self.latents: LatentTokens | None = None
        self.branch: str | None = None


class Traced:
    """Ambience inside a graph that torch.compile traces. Writes and reads meet within one trace, so it holds
    nothing at run time; a thread-local would not be traceable."""

    def __init__(self) -> None:
        self.layer: torch.Tensor | None = None
        self.latents: LatentTokens | None = None
        self.learned: tuple[torch.Tensor, ...] = ()


EAGER = Eager()
TRACED = Traced()
