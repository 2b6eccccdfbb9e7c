"""First Block Cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from .protocol import Reuse, Surroundings


@dataclass(frozen=True)
class FirstBlock(Reuse):
    """What the blocks behind the first added in the last computed step, while the first block adds about the same.

    The rule of ParaAttention's First Block Cache, by diffusers' hooks. It waits for the device once a forward.

    Attributes:
        threshold: mean absolute change of what the first block adds since the last computed step, relative to the
            mean of what it added then, up to which the rest is reused.
    """

    needs_all_streams: ClassVar[bool] = True
    needs_usual_names: ClassVar[bool] = True

    threshold: float = 0.08

    def __post_init__(self) -> None:
        if not self.threshold >= 0.0:
            raise ValueError(f"reuse.threshold must be at least 0, got {self.threshold}.")

    def apply(self, stand_in: nn.Module, blocks: Sequence[str], around: Surroundings) -> None:
        from diffusers.hooks.first_block_cache import FirstBlockCacheConfig, apply_first_block_cache

        apply_first_block_cache(stand_in, FirstBlockCacheConfig(threshold=self.threshold))
        registry: Any = stand_in.get_submodule(blocks[0])._diffusers_hook
        for hook in registry.hooks.values():
            hook._should_compute_remaining_blocks = partial(_has_changed, hook, around)

    def force(self, state: Any) -> None:
        state.head_block_residual = None  # nothing to compare with: diffusers then computes


def _has_changed(hook: Any, around: Surroundings, added: torch.Tensor) -> bool:
    """diffusers' own rule, of the tokens of all processes that share the forward: each sees its own part of them."""
    before = hook.state_manager.get_state().head_block_residual
    if before is None:
        return True
    sums = torch.stack([(added - before).abs().sum(dtype=torch.float32), before.abs().sum(dtype=torch.float32)])
    change, size = around.total(sums).tolist()
    return not change <= hook.threshold * size
