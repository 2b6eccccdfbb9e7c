"""TaylorSeer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .protocol import Reuse, Surroundings, missing


@dataclass(frozen=True)
class Forecast(Reuse):
    """The output of the last block, continued from the computed steps by a Taylor series.

    TaylorSeer (arXiv 2503.06923), by diffusers' hooks: the last block forecasts, the others are skipped.

    Attributes:
        interval: one step of so many is computed.
        warmup: steps at the start of a run that are all computed; one at least is.
        order: of the series; 0 repeats the last computed output.
    """

    interval: int = 3
    warmup: int = 3
    order: int = 1

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"reuse.interval must be at least 1 step, got {self.interval}.")
        if self.warmup < 0:
            raise ValueError(f"reuse.warmup must be at least 0 steps, got {self.warmup}.")
        if not 0 <= self.order <= 4:
            raise ValueError(f"reuse.order must lie in [0, 4], got {self.order}.")

    def apply(self, stand_in: nn.Module, blocks: Sequence[str], around: Surroundings) -> None:  # noqa: ARG002
        try:
            from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig, apply_taylorseer_cache
        except ImportError as error:
            raise missing("TaylorSeer cache") from error
        # Named one by one: diffusers' own patterns find no layer whose name goes on behind "attn", as Wan's do.
        *others, last = (re.escape(path) for path in blocks)
        config = TaylorSeerCacheConfig(
            cache_interval=self.interval,
            disable_cache_before_step=self.warmup,
            max_order=self.order,
            taylor_factors_dtype=None,  # the block's own
            skip_predict_identifiers=others,
            cache_identifiers=[last],
        )
        apply_taylorseer_cache(stand_in, config)

    def force(self, state: Any) -> None:
        # diffusers decides by the number of the step behind the warm-up, and its series by differences: moved both
        # alike, the step that comes is the first which the interval computes.
        by = state.current_step - self.warmup
        if by >= -1:
            state.current_step -= by
            if state.last_update_step is not None:
                state.last_update_step -= by
