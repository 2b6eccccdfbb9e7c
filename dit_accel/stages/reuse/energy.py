"""SeaCache."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ...layout import StepContext
from .protocol import Reuse, Surroundings, missing


@dataclass(frozen=True)
class Energy(Reuse):
    """What all blocks added, continued over the steps, while the latents that a denoiser can know change little.

    SeaCache (arXiv 2602.18993), by diffusers' hooks: latents are filtered by the share of signal that each frequency
    has at the step's noise level. For flow-matching models, whose sigmas lie in [0, 1]. It waits for the device once
    a forward.

    Attributes:
        threshold: sum of the filtered latents' relative changes up to which steps are skipped in a row.
        order: 1 continues the last two computed steps in a straight line, 0 repeats the last.
        first, last: steps at the start and at the end of a run that are all computed.
        max_skipped: steps skipped in a row at most; 0 for any number.
        power: exponent of the signal's spectrum.
    """

    needs_latents: ClassVar[bool] = True
    needs_all_streams: ClassVar[bool] = True

    threshold: float = 0.25
    order: int = 1
    first: int = 1
    last: int = 1
    max_skipped: int = 2
    power: float = 3.0

    def __post_init__(self) -> None:
        if not self.threshold >= 0.0:
            raise ValueError(f"reuse.threshold must be at least 0, got {self.threshold}.")
        if self.order not in (0, 1):
            raise ValueError(f"reuse.order must be 0 or 1, got {self.order}.")
        for name in ("first", "last", "max_skipped"):
            if getattr(self, name) < 0:
                raise ValueError(f"reuse.{name} must be at least 0 steps, got {getattr(self, name)}.")
        if not self.power > 0.0:
            raise ValueError(f"reuse.power must be above 0, got {self.power}.")

    def not_at(self, step: StepContext) -> str | None:
        if step.sigma is not None and 0.0 <= step.sigma <= 1.0:
            return None
        return "SeaCache needs noise levels in [0, 1], as flow-matching schedulers have, and this one has others."

    def apply(self, stand_in: nn.Module, blocks: Sequence[str], around: Surroundings) -> None:  # noqa: ARG002
        try:
            from diffusers.hooks.sea_cache import SeaCacheConfig, apply_sea_cache
        except ImportError as error:
            raise missing("SeaCache") from error
        config = SeaCacheConfig(
            threshold=self.threshold,
            residual_order=self.order,
            retention_steps=self.first,
            cache_end_steps=self.last,
            max_consecutive_cached=self.max_skipped,
            power_exp=self.power,
            raw_vision_callback=lambda module, args, kwargs: around.latents(),  # noqa: ARG005
        )
        apply_sea_cache(stand_in, config)
        shared = _of_threads(around)
        for module in stand_in.modules():
            registry: Any = getattr(module, "_diffusers_hook", None)
            for hook in registry.hooks.values() if registry is not None else ():
                hook.shared_state = shared

    def force(self, state: Any) -> None:
        state.previous_indicator = None  # nothing to compare with: diffusers then computes


def _of_threads(around: Surroundings) -> Any:
    """diffusers' shared state of a transformer's hooks, of which each thread sees its own forward. Processes that share
    one run all blocks where any of them would."""
    from diffusers.hooks.sea_cache import SeaCacheSharedState

    class OfThreads(SeaCacheSharedState):
        def __init__(self) -> None:
            self._seen = threading.local()
            super().__init__()

        def resolve_gate(self, state: Any, *given: Any) -> bool:
            computes: bool = around.any(super().resolve_gate(state, *given))
            if computes and not state.gate_should_compute:
                state.gate_should_compute, state.accumulated_distance = True, 0.0
            return computes

        @property
        def forward_metadata(self) -> Any:
            return getattr(self._seen, "metadata", None)

        @forward_metadata.setter
        def forward_metadata(self, metadata: Any) -> None:
            self._seen.metadata = metadata

    return OfThreads()
