"""What a run keeps of its layers between steps: plans, and what earlier plans and dense steps left to the next ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .call import AttentionCall
from .kernels import BlockMask
from .kernels.mask.packed import PackedBlockMask
from .layout import StepContext, TokenLayout
from .plan import AttentionPlan, LayerMemory, PlanShares
from .run import Kept
from .stages.drift import BlockMeans


@dataclass(frozen=True, eq=False)
class KeptPlan:
    """A plan, when it was made, and of which queries and keys where the schedule guards against drift; when its blocks
    were chosen, where that was later.

    The mask of a single layer is packed: the lists of all layers and branches of a large model are gigabytes.
    ``share`` is the mask's density, worked out once; ``shares`` what processes around a ring have of it.
    """

    made: StepContext
    rows: torch.Tensor | None
    mask: BlockMask | PackedBlockMask
    compensation: Any
    share: torch.Tensor
    means: BlockMeans | None = None
    chosen: StepContext | None = None
    keys: torch.Tensor | None = None
    shares: PlanShares = field(default_factory=PlanShares)
    _plan: AttentionPlan | None = field(default=None, init=False, repr=False)

    @classmethod
    def of(cls, call: AttentionCall, plan: AttentionPlan, means: BlockMeans | None = None) -> KeptPlan:
        """A plan of a single layer, made for this call."""
        mask: BlockMask | PackedBlockMask = plan.mask
        if plan.mask.token_bits is None:
            mask = PackedBlockMask.of(plan.mask, call.key_mask is not None, call.backend("selection"))
        kept = cls(call.step, plan.rows, mask, plan.compensation, plan.density, means, keys=plan.keys)
        plan.with_shares(kept.shares)  # what the first call cuts serves the next ones
        return kept

    @property
    def plan(self) -> AttentionPlan:
        """The plan, its mask packed until it is read."""
        if self._plan is not None:
            return self._plan
        plan = AttentionPlan(self.rows, self.mask, self.compensation, self.share, self.keys).with_shares(self.shares)
        if isinstance(self.mask, BlockMask) or self.mask.keeps_lists:
            object.__setattr__(self, "_plan", plan)  # else its lists would stay with it
        return plan


def kept_of(call: AttentionCall) -> Kept:
    """What the run of a call keeps for its layout and key mask.

    What a CUDA graph makes while it is captured is the graph's own: it holds nothing before a replay, something else
    after each, and its memory ends with the graph. No other call finds it.
    """
    assert isinstance(call.layout, TokenLayout)
    if call.captured:
        return call.run.kept(call.layout, call.mask, call.step.forward_id).apart()
    if call.kept is None:
        call.kept = call.run.kept(call.layout, call.mask, call.step.forward_id)
    return call.kept


def plan_key(call: AttentionCall) -> tuple[Any, ...]:
    """Which calls of one layout and key mask may share a plan within a run."""
    return call.layer, call.step.branch, call.q.shape[0], call.q.device


def memory_of(call: AttentionCall) -> LayerMemory:
    """The layer's memory of this run; an empty one where no step is known or a forward is repeated."""
    if call.step.index is None or call.repeated:
        return LayerMemory()
    return kept_of(call).memories.setdefault(plan_key(call), LayerMemory())
