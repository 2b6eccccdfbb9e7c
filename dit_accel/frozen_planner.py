"""Plans taken from a calibration."""

from __future__ import annotations

import torch

from .call import AttentionCall
from .kept_plans import KeptPlan, kept_of
from .kernels.common.choice import Case, Choice, Operation
from .layout import StepContext, TokenLayout
from .plan import AttentionPlan, LayerMemory
from .planner import Planner, PlanSource
from .recipe import Recipe
from .records import LayerRecord
from .stages.select.frozen import FrozenMasks


class FrozenPlanner(Planner):
    """Plans whose masks a calibration made, in place of the recipe's own selection.

    Args:
        masks: of the calibration.
        rederive: select anew where the masks do not fit, rather than raise.
    """

    def __init__(self, recipe: Recipe, masks: FrozenMasks, rederive: bool = False) -> None:
        if recipe.compensate.watches_dense:
            raise ValueError(
                f"{type(recipe.compensate).__name__} keeps something of dense steps that make plans, and a calibration "
                "has made its plans: give another compensation."
            )
        super().__init__(recipe)
        self.masks = masks
        self.rederive = rederive

    @property
    def goes_round(self) -> bool:
        """Whether processes around a ring can plan together: masks that were made need no queries and keys."""
        return not self.rederive or super().goes_round

    def source(self, step: StepContext, layer: int, layout: TokenLayout) -> PlanSource | None:
        """The part of the trajectory whose masks hold at ``step``."""
        if self._why_not(layout, step) is not None:
            return super().source(step, layer, layout)
        assert step.sigma is not None
        return PlanSource(self.masks.bucket(step.sigma), anew=False)

    def refuse(self, call: AttentionCall) -> None:
        """Raise where the masks do not fit and nothing is selected anew."""
        reason = None if self.rederive else self._why_not(call.layout, call.step)
        if reason is not None:
            raise ValueError(f"{reason} Calibrate for this, or patch with rederive=True to select anew.")

    def is_search(self, _call: AttentionCall, _made: StepContext) -> bool:
        """Never: there is nothing to search."""
        return False

    def memory_of_search(self, _call: AttentionCall) -> LayerMemory | None:
        """None: see :meth:`is_search`."""
        return None

    def _selection_choices(self, case: Case, backend: str) -> dict[Operation, Choice]:
        return super()._selection_choices(case, backend) if self.rederive else {}

    def _plan(self, call: AttentionCall, book: LayerRecord) -> tuple[StepContext, AttentionPlan]:
        reason = self._why_not(call.layout, call.step)
        if reason is None:
            return call.step, self._frozen_plan(call, book)
        self.refuse(call)
        return super()._plan(call, book)

    def _why_not(self, layout: TokenLayout | str, step: StepContext) -> str | None:
        if layout != self.masks.layout:
            return f"The calibration is for {self.masks.layout}, the call has {layout}."
        if step.sigma is None:
            return "Calibrated plans are found by sigma, and a bare model or this scheduler shows none."
        return None

    def _frozen_plan(self, call: AttentionCall, book: LayerRecord) -> AttentionPlan:
        """The calibrated plan of a call; the last one of each layer and branch is kept on the device."""
        assert call.step.sigma is not None
        bucket = self.masks.bucket(call.step.sigma)
        compensate = self.recipe.compensate
        # What a compensation works out of queries and keys is of one branch, and of one batch.
        place = ("frozen", call.layer, call.q.device, None if compensate.is_static else call.step.branch)
        version = (bucket, None if compensate.is_static else call.q.shape[0])
        plans = kept_of(call).plans
        if place in plans and plans[place][0] == version:
            kept: KeptPlan = plans[place][1]
            return kept.plan
        with torch.no_grad():
            prepared = self.tables.prepare(call)
            blocks = prepared.blocks
            mask = self.masks.mask(call.layer, bucket, blocks, call.key_mask, call.backend("selection"), call.heads)
            call.seen = self._cut(call, prepared)
            try:
                mask = self._shown(call, prepared, mask)
            finally:
                call.seen = None
            plan = AttentionPlan(blocks.kernel_rows, mask, compensate.prepare(blocks, mask, call))
        book.plans_made += 1
        if call.repeated or call.captured:
            return plan
        kept = KeptPlan.of(call, plan)
        plans[place] = (version, kept)
        # Its lists wait for the device when they are read first: now, since the next call may be captured.
        return kept.plan
