"""When attention stays dense, and when a plan is made anew."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ..layout import StepContext
from .compensate.protocol import Compensation
from .select.protocol import Select

DENSE_PHASE = "dense phase"
DENSE_LAYER = "dense layer"


@dataclass(frozen=True)
class Schedule:
    """Dense phase, dense layers, and the life of a plan.

    Attributes:
        dense_fraction: share of the denoising steps, from the first, that stay dense. Any value above 0 keeps
            at least the first step dense. Without a pipeline (a bare transformer) no step counts as first.
        dense_layers: self-attention layers that stay dense, by index; negative counts from the last.
        refresh_every: a plan serves this many denoising steps before it is made again. Steps that a recipe's reuse
            skips do not count.
        refresh_at: instead of a fixed stride, make plans only at these points of the trajectory (progress in
            [0, 1)), and whenever there is none yet. Without a pipeline ``refresh_every`` counts forwards.
        dense_refresh: compute a step that makes a plan densely, and use the plan from the next step on. Acts
            in a pipeline only.
        plan_in_dense_phase: make the first plan in the last step of the dense phase in place of the first step
            after it; for ``dense_refresh``, which then adds no dense step.
        density_points: density of the plans made along the trajectory, as (position, density) pairs in
            between which it is interpolated linearly and beyond which it stays; empty leaves the selection's
            own. A position is a progress in [0, 1) or a sigma, see ``density_over``.
        density_over: "progress" or "sigma". Without a sigma (a scheduler that has none, a bare transformer)
            the selection's own density holds.
        choose_every: between plans, choose the blocks anew every so many steps that ran all blocks, from what the last
            search found, as far as the selection can (:class:`~dit_accel.stages.select.mass.Mass`); 0: never. Such a
            step is not dense. Acts in a pipeline only.
        few_steps: runs without guidance of at most so many steps have no dense step, neither a dense phase nor a dense
            search: a plan then serves the very step that makes it. 0: no run has few steps.
        own_dense: steps of the dense phase take this package's kernel, over all blocks, where that is as fast as the
            model's own attention (:mod:`dit_accel.dense_kernel`); outputs then differ by rounding. A call keeps the
            model's own attention where it needs gradients, has a mask of token pairs, or is shared around a ring. A
            search that needs the log-sum-exp takes the kernel in any case.
        drift_bound: reuse a plan while the mean query and key of every block have changed by at most this
            share since it was made (see :class:`~dit_accel.stages.drift.BlockMeans`), and make it again when
            they have. ``refresh_every`` above 1 and ``refresh_at`` still limit its age. Costs one read of
            queries and keys, and one wait for the device, per layer and step.
    """

    dense_fraction: float = 0.0
    dense_layers: tuple[int, ...] = ()
    refresh_every: int = 1
    refresh_at: tuple[float, ...] = ()
    dense_refresh: bool = False
    plan_in_dense_phase: bool = False
    density_points: tuple[tuple[float, float], ...] = ()
    density_over: str = "progress"
    drift_bound: float | None = None
    choose_every: int = 0
    few_steps: int = 0
    own_dense: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.dense_fraction <= 1.0:
            raise ValueError(f"schedule.dense_fraction must lie in [0, 1], got {self.dense_fraction}.")
        if self.refresh_every < 1:
            raise ValueError(f"schedule.refresh_every must be at least 1 step, got {self.refresh_every}.")
        if any(not 0.0 <= point < 1.0 for point in self.refresh_at):
            raise ValueError(f"schedule.refresh_at must hold progress values in [0, 1), got {self.refresh_at}.")
        for _, density in self.density_points:
            if not 0.0 < density <= 1.0:
                raise ValueError(f"schedule.density_points must hold densities in (0, 1], got {density}.")
        positions = [position for position, _ in self.density_points]
        if len(set(positions)) < len(positions):
            raise ValueError(f"schedule.density_points must differ in position, got {self.density_points}.")
        if self.density_over not in ("progress", "sigma"):
            raise ValueError(f"schedule.density_over must be progress or sigma, got {self.density_over!r}.")
        if self.plan_in_dense_phase and not self.dense_refresh:
            raise ValueError(
                "schedule.plan_in_dense_phase needs schedule.dense_refresh: the step of its plan must stay dense."
            )
        if self.drift_bound is not None and self.drift_bound <= 0.0:
            raise ValueError(f"schedule.drift_bound must be above 0, got {self.drift_bound}.")
        if self.choose_every < 0:
            raise ValueError(f"schedule.choose_every must be at least 0 steps, got {self.choose_every}.")
        if self.few_steps < 0:
            raise ValueError(f"schedule.few_steps must be at least 0 steps, got {self.few_steps}.")
        if self.choose_every and self.drift_bound is not None:
            raise ValueError(
                "schedule.choose_every and schedule.drift_bound both say when a kept plan changes: give one."
            )

    def conflicts_with(self, select: Select, compensate: Compensation) -> str | None:
        """A sentence that says why a selection or compensation cannot follow this schedule; None where they can."""
        if compensate.watches_dense:
            name = type(compensate).__name__
            if not self.dense_refresh or not self.keeps_plans:
                return (
                    f"{name} needs dense steps now and then: schedule.dense_refresh=True, and when "
                    "(schedule.refresh_at or schedule.refresh_every above 1)."
                )
            if self.choose_every:
                return f"{name} adds what a plan left out, and schedule.choose_every changes the plan: give one."
        if self.density_points and select.head_densities:
            return "schedule.density_points and select.head_densities both set the density: give one."
        if self.density_points and not select.has_density:
            return f"schedule.density_points need a selection with a density, got {type(select).__name__}."
        if self.choose_every and not select.can_choose_anew:
            return f"schedule.choose_every needs a selection that remembers a search, got {type(select).__name__}."
        return None

    @property
    def keeps_plans(self) -> bool:
        """Whether a plan outlives the forward that made it."""
        return self.refresh_every > 1 or bool(self.refresh_at) or self.drift_bound is not None

    @property
    def follows_steps(self) -> bool:
        """Whether anything here depends on the denoising step."""
        return self.dense_fraction > 0 or self.dense_refresh or self.keeps_plans or bool(self.density_points)

    def dense_reason(self, step: StepContext, layer: int, num_layers: int) -> str | None:
        """Why this call stays dense, or None if it may run sparse."""
        if layer in self.dense_layers or layer - num_layers in self.dense_layers:
            return DENSE_LAYER
        if step.index is not None and step.num_steps and not self._has_few_steps(step):
            ahead = step.index + (1 if self.plan_in_dense_phase else 0)
            if ahead / step.num_steps < self.dense_fraction:
                return DENSE_PHASE
        return None

    def searches_densely(self, step: StepContext) -> bool:
        """Whether a step that makes a plan is dense. A bare transformer has no steps, and would search each time."""
        return self.dense_refresh and step.index is not None and not self._has_few_steps(step)

    def density(self, step: StepContext) -> float | None:
        """Density of a plan made at ``step``; None where the selection's own holds."""
        position = step.sigma if self.density_over == "sigma" else step.progress
        if position is None or not self.density_points:
            return None
        points = sorted(self.density_points)
        if position <= points[0][0]:
            return points[0][1]
        for (left, before), (right, after) in pairwise(points):
            if position <= right:
                return before + (after - before) * (position - left) / (right - left)
        return points[-1][1]

    def needs_plan(self, step: StepContext, made: StepContext) -> bool:
        """Whether a plan made at ``made``, a forward of the same run, is too old for ``step``."""
        if step.index is None or made.index is None:
            return self._too_old(step.forward_id - made.forward_id)
        if step.forward_id == made.forward_id:
            return False
        if step.index <= made.index:
            return True
        if self.refresh_at:
            now, then = step.progress or 0.0, made.progress or 0.0
            return any(then < point <= now for point in self.refresh_at)
        if step.computed is not None and made.computed is not None:
            return self._too_old(step.computed - made.computed)
        return self._too_old(step.index - made.index)

    def chooses_anew(self, step: StepContext, chosen: StepContext) -> bool:
        """Whether blocks chosen at ``chosen`` are to be chosen anew at ``step``."""
        if not self.choose_every or step.index is None or chosen.index is None:
            return False
        if step.computed is not None and chosen.computed is not None:
            return step.computed - chosen.computed >= self.choose_every
        return step.index - chosen.index >= self.choose_every

    def plans_now(self, step: StepContext, made: StepContext | None, num_layers: int) -> bool:
        """Whether layers make plans at ``step`` that are kept, the last of a run having been made at ``made``."""
        if not self.keeps_plans or all(self.dense_reason(step, layer, num_layers) for layer in range(num_layers)):
            return False
        return made is None or self.needs_plan(step, made)

    def plans_after(self, step: StepContext) -> bool:
        """Whether a run makes another plan after the one of ``step``."""
        if not self.refresh_at or step.progress is None:
            return True
        return any(point > step.progress for point in self.refresh_at)

    def _has_few_steps(self, step: StepContext) -> bool:
        return step.num_steps is not None and step.num_steps <= self.few_steps and not step.guided

    def _too_old(self, age: int) -> bool:
        if self.drift_bound is not None and self.refresh_every == 1:
            return False  # the drift decides
        return age >= self.refresh_every


SCHEDULES: dict[str, type[Schedule]] = {"schedule": Schedule}
