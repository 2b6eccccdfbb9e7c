"""Where the latent tokens sit in a sequence, and where a call sits in the denoising trajectory."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class TokenLayout:
    """One attention sequence: a latent grid, and other tokens (text, references, padding) around it.

    Latent token ``(f, h, w)`` of the grid ``(F, H, W)`` sits at ``latent_start + (f * H + h) * W + w``.
    Selection acts on latent x latent pairs; every other token reads and is read in full.

    Attributes:
        grid: latent frames, height and width in tokens (after patchify); an image has one frame.
        latent_start: position of the first latent token.
        seq_len: tokens in the whole sequence.
    """

    grid: tuple[int, int, int]
    latent_start: int
    seq_len: int

    def __post_init__(self) -> None:
        if min(self.grid) < 1:
            raise ValueError(f"A latent grid needs at least one token per dimension, got {self.grid}.")
        if self.latent_start < 0 or self.latent_start + self.num_latent > self.seq_len:
            raise ValueError(
                f"A grid of {self.grid} starting at token {self.latent_start} does not fit a sequence of "
                f"{self.seq_len} tokens."
            )

    @property
    def num_latent(self) -> int:
        return prod(self.grid)

    @property
    def num_extra(self) -> int:
        """Tokens that are not on the latent grid."""
        return self.seq_len - self.num_latent

    @property
    def forced_share(self) -> float:
        """Share of all query-key pairs with a token that is not latent: they are read in full."""
        return 1.0 - (self.num_latent / self.seq_len) ** 2


@dataclass(frozen=True)
class StepContext:
    """Where one transformer forward sits in the denoising trajectory.

    Attributes:
        index: denoising step, from 0; None outside a pipeline run, and where a pipeline does not show it.
        num_steps: steps of the run; None where there is no index.
        sigma: noise level of the step where the scheduler has one.
        branch: guidance branch: the pipeline's name for it ("cond", "uncond", ...), or the ordinal of the forward
            within its step ("#0", "#1") where it has no name; None outside a pipeline run. Where a layer attends
            sample by sample, the second call's ends in "[1]", and so on.
        forward_id: counts the forwards of this transformer, so that a plan knows its age.
    """

    index: int | None = None
    num_steps: int | None = None
    sigma: float | None = None
    branch: str | None = None
    forward_id: int = 0

    @property
    def progress(self) -> float | None:
        """Share of the steps already done, in [0, 1); None outside a pipeline run."""
        if self.index is None or not self.num_steps:
            return None
        return self.index / self.num_steps
