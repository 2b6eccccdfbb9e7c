"""What the hooks of a running transformer tell the attention call inside it.

diffusers' processors call attention through a module-level symbol that carries no identity, so the hooks publish it
beside the call: which layer this is, and where the latent tokens are.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from .session import Session


class LatentTokens(NamedTuple):
    """What a family reads from the arguments of a transformer's forward. One of grid and ids is given.

    Attributes:
        grid: latent frames, height and width in tokens; empty when only ``ids`` can tell.
        tokens: tokens of the latent stream, references behind the grid included.
        ids: positions of the tokens, of models that pass no size; the family reads them, when attention runs and
            not while a graph is traced.
        start: tokens of the latent stream before the grid.
        references: grids of further latents, each frames, height, width and the tokens of the latent stream before it.
    """

    grid: tuple[int, ...]
    tokens: int
    ids: torch.Tensor | None = None
    start: int = 0
    references: tuple[tuple[int, int, int, int], ...] = ()

    def places(self) -> list[int]:
        """The grids as a graph holds them: four numbers each, what is generated first; empty without a grid."""
        if not self.grid:
            return []
        return [number for part in ((*self.grid, self.start), *self.references) for number in part]

    @classmethod
    def of_places(cls, places: Sequence[int], tokens: int, ids: torch.Tensor | None) -> LatentTokens:
        """From what :meth:`places` gave."""
        if not places:
            return cls((), tokens, ids)
        frames, height, width, start = places[:4]
        others = tuple((f, h, w, at) for f, h, w, at in zip(*(places[4 + n :: 4] for n in range(4)), strict=True))
        return cls((frames, height, width), tokens, ids, start, others)


class Eager(threading.local):
    """Ambience of eager code: one per thread, since pipelines may run side by side.

    Attributes:
        layer: session and index of the attention layer that is running.
        attended: whether its attention call has come to the seam.
        branch: guidance branch as the pipeline names it.
        learned: what a learned gate made of the layer's input; empty where there is none.
    """

    def __init__(self) -> None:
        self.layer: tuple[Session, int] | None = None
        self.attended = False
        self.branch: str | None = None
        self.learned: tuple[torch.Tensor, ...] = ()


class Traced:
    """Ambience inside a graph that torch.compile traces. Writes and reads meet within one trace, so it holds
    nothing at run time; a thread-local would not be traceable.

    Attributes:
        block_input: first tensor of the block that is traced, by which a checkpointed block is recognised when it is
            repeated.
        counts: dense calls of the layer by reason, see :func:`~dit_accel.patches.operator.count_op`.
    """

    def __init__(self) -> None:
        self.layer: torch.Tensor | None = None
        self.attended = False
        self.counts: torch.Tensor | None = None
        self.latents: LatentTokens | None = None
        self.block_input: torch.Tensor | None = None
        self.learned: tuple[torch.Tensor, ...] = ()

    def clear(self) -> None:
        """Publish nothing."""
        self.layer = self.counts = self.latents = self.block_input = None
        self.learned = ()


EAGER = Eager()
TRACED = Traced()
