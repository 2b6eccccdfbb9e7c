"""When attention stays dense, and when a plan is made anew."""

from __future__ import annotations

from dataclasses import dataclass

from ..layout import StepContext


@dataclass(frozen=True)
class Schedule:
    """Dense phase, dense layers, and the life of a plan.

    Attributes:
        dense_fraction: share of the denoising steps, from the first, that stay dense. Any value above 0 keeps
            at least the first step dense. Without a pipeline (a bare transformer) no step counts as first.
        dense_layers: self-attention layers that stay dense, by index; negative counts from the last.
        refresh_every: a plan serves this many denoising steps before it is made again.
        refresh_at: instead of a fixed stride, make plans only at these points of the trajectory (progress in
            [0, 1)), and whenever there is none yet.
    """

    dense_fraction: float = 0.0
    dense_layers: tuple[int, ...] = ()
    refresh_every: int = 1
    refresh_at: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.dense_fraction <= 1.0:
            raise ValueError(f"schedule.dense_fraction must lie in [0, 1], got {self.dense_fraction}.")
        if self.refresh_every < 1:
            raise ValueError(f"schedule.refresh_every must be at least 1 step, got {self.refresh_every}.")
        if any(not 0.0 <= point < 1.0 for point in self.refresh_at):
            raise ValueError(
                f"schedule.refresh_at must hold progress values in [0, 1), got {self.refresh_at}."
            )

    @property
    def keeps_plans(self) -> bool:
        """Whether a plan outlives the forward that made it."""
        return self.refresh_every > 1 or bool(self.refresh_at)

    def dense_reason(self, step: StepContext, layer: int, num_layers: int) -> str | None:
        """Why this call stays dense, or None if it may run sparse."""
        if layer in self.dense_layers or layer - num_layers in self.dense_layers:
            return "dense layer"
        if step.progress is not None and step.progress < self.dense_fraction:
            return "dense phase"
        return None

    def needs_plan(self, step: StepContext, made: StepContext) -> bool:
        """Whether a plan made at ``made`` is too old for ``step``, or belongs to an earlier run."""
        if step.index is None or made.index is None:
            return step.forward_id - made.forward_id >= self.refresh_every
        if step.forward_id == made.forward_id:
            return False
        if step.index <= made.index:
            return True
        if self.refresh_at:
            now, then = step.progress or 0.0, made.progress or 0.0
            return any(then < point <= now for point in self.refresh_at)
        return step.index - made.index >= self.refresh_every


SCHEDULES: dict[str, type[Schedule]] = {"schedule": Schedule}
