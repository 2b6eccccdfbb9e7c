"""What a way of reuse across steps offers to a patch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import nn

from ...layout import StepContext


class Surroundings(NamedTuple):
    """What hooks of a cache may ask of the forward that runs in this thread.

    Attributes:
        step: of the forward.
        latents: what is denoised, one tensor (C, F, H, W) for each sample; None where the family shows none.
        total: a tensor summed over the processes that share the forward, up to a factor; as it is in one process. What
            decides by a process' own tokens must ask, and all must ask alike.
        any: whether any of these processes says so.
    """

    step: Callable[[], StepContext]
    latents: Callable[[], list[torch.Tensor] | None]
    total: Callable[[torch.Tensor], torch.Tensor]
    any: Callable[[bool], bool]


class Reuse(Protocol):
    """Which forwards take an earlier step's result in place of running all blocks.

    The caches are diffusers' own. A kind puts their hooks on a stand-in of the transformer, whose blocks have the
    model's classes and no weights; the patch calls these hooks around the real blocks, and gives them a state that
    belongs to one run and one guidance branch.

    Attributes:
        is_none: every forward runs all blocks.
        needs_latents: its hooks look at what is denoised.
        needs_all_streams: the last block must return the prompt apart from the latents, where the first does.
        takes_dropped_stream: the last block may return nothing of the prompt.
        needs_usual_names: blocks must call the latents ``hidden_states``.
        needs_usual_prompt: blocks that return the prompt must call it ``encoder_hidden_states``.
        shares_guidance: in some steps one guidance branch takes from another what its blocks add.
    """

    is_none: ClassVar[bool] = False
    needs_latents: ClassVar[bool] = False
    needs_all_streams: ClassVar[bool] = False
    takes_dropped_stream: ClassVar[bool] = False
    needs_usual_names: ClassVar[bool] = False
    needs_usual_prompt: ClassVar[bool] = False

    @property
    def shares_guidance(self) -> bool:
        return False

    def refusal(self) -> str | None:
        """A sentence that says what is missing to patch a model; None where nothing is."""
        return None

    def not_at(self, step: StepContext) -> str | None:
        """A sentence that says why nothing can be reused at a step of a run; None where it can."""
        return None

    def apply(self, stand_in: nn.Module, blocks: Sequence[str], around: Surroundings) -> None:
        """Put the hooks on a stand-in.

        Args:
            stand_in: has the lists of blocks.
            blocks: paths of all blocks, in the order of execution.
            around: what the hooks may ask when they run.

        Raises:
            ValueError: the installed diffusers lacks this cache.
        """
        raise TypeError(f"{type(self).__name__} has no hooks.")

    def begin(self, state: Any, step: StepContext, leading: Any | None) -> None:
        """Called once a forward, before a hook sees a state of its branch.

        Args:
            leading: the state of the branch that was given the same latents first in this step; None for that itself.
        """
        return None

    def force(self, state: Any) -> None:
        """Change a state so that the forward which begins runs all blocks."""
        raise TypeError(f"{type(self).__name__} has no hooks.")


def missing(name: str) -> ValueError:
    """What to raise where diffusers is too old."""
    return ValueError(f"The installed diffusers has no {name}, which this reuse needs; install 0.42 or newer.")
