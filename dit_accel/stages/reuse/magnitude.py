"""MagCache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import nn

from ...layout import StepContext
from .protocol import Reuse, Surroundings, missing


@dataclass(frozen=True)
class Magnitude(Reuse):
    """What all blocks added in the last computed step, while its size is known to change little.

    MagCache (arXiv 2506.09045), by diffusers' hooks: how the size of what the blocks add changes from step to step
    is nearly the same for every prompt, so it is measured once for a checkpoint. No forward waits for the device.

    Attributes:
        threshold: sum of the estimated relative errors up to which steps are skipped in a row.
        max_skipped: steps skipped in a row at most.
        retention: share of the steps, from the first, that are all computed.
        ratios: mean norm of what the blocks add at a step over that of the step before, one a step, from the first
            (whose ratio is 1). A run of another number of steps takes the nearest ones. diffusers measures them:
            ``MagCacheConfig(calibrate=True)``.
    """

    takes_dropped_stream: ClassVar[bool] = True
    needs_usual_prompt: ClassVar[bool] = True

    threshold: float = 0.06
    max_skipped: int = 3
    retention: float = 0.2
    ratios: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.threshold >= 0.0:
            raise ValueError(f"reuse.threshold must be at least 0, got {self.threshold}.")
        if self.max_skipped < 1:
            raise ValueError(f"reuse.max_skipped must be at least 1 step, got {self.max_skipped}.")
        if not 0.0 <= self.retention <= 1.0:
            raise ValueError(f"reuse.retention must lie in [0, 1], got {self.retention}.")
        if not all(ratio > 0.0 for ratio in self.ratios):
            raise ValueError(f"reuse.ratios must all be above 0, got {self.ratios}.")

    def refusal(self) -> str | None:
        if self.ratios:
            return None
        return (
            "reuse magnitude needs reuse.ratios, which belong to a checkpoint: run diffusers' "
            "MagCacheConfig(calibrate=True) once and give what it prints."
        )

    def apply(self, stand_in: nn.Module, blocks: Sequence[str], around: Surroundings) -> None:  # noqa: ARG002
        try:
            from diffusers.hooks.mag_cache import MagCacheConfig, apply_mag_cache
        except ImportError as error:
            raise missing("MagCache") from error

        def config_of(num_steps: int) -> Any:
            return MagCacheConfig(
                threshold=self.threshold,
                max_skip_steps=self.max_skipped,
                retention_ratio=self.retention,
                num_inference_steps=num_steps,
                mag_ratios=list(self.ratios),
            )

        apply_mag_cache(stand_in, config_of(len(self.ratios)))
        of_run = _ConfigOfRun(config_of, around)
        for module in stand_in.modules():
            registry: Any = getattr(module, "_diffusers_hook", None)
            for hook in registry.hooks.values() if registry is not None else ():
                hook.config = of_run

    def begin(self, state: Any, step: StepContext, leading: Any | None) -> None:  # noqa: ARG002
        # diffusers counts forwards; a run may begin at a later step.
        state.step_index = step.index

    def force(self, state: Any) -> None:
        state.previous_residual = None


class _ConfigOfRun:
    """Stands in for diffusers' MagCacheConfig, which is made for one number of steps: each run has its own."""

    def __init__(self, config_of: Callable[[int], Any], around: Surroundings) -> None:
        self._config_of = config_of
        self._around = around

    @cached_property
    def _configs(self) -> dict[int, Any]:
        return {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        num_steps = self._around.step().num_steps or 1
        if num_steps not in self._configs:
            self._configs[num_steps] = self._config_of(num_steps)
        return getattr(self._configs[num_steps], name)
