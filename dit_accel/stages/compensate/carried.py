"""What a plan left out where it was made, added again in later steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...call import AttentionCall
from ...kernels.common.choice import Case, Choice, Operation
from ...plan import AttentionPlan, LeftOut
from ..select.protocol import Select
from .protocol import Attended, Compensation, Sparse
from .residual import PooledResidual

_MEANS = PooledResidual()


@dataclass(frozen=True)
class Carried(Compensation):
    """The difference of dense and sparse attention in the last dense step, added to sparse attention after it.

    It is the residual of DiTFastAttn's window attention (arXiv 2406.08552), for any selection, and weighs less with
    age: ``1 - age / lasts``. The schedule says when there is a dense step (``dense_refresh``; also static selections
    have one there). Each layer and guidance branch keeps a tensor like its output: 0.1 GB for 32,760 tokens of 12 heads
    of 128. A bare transformer has no dense step, and carries nothing. Inference only.

    Attributes:
        lasts: share of the run's steps after which nothing is added.
        bits: 16 keeps the difference in the call's dtype, 8 in integers with a scale for each token and head, which
            takes half the memory and loses up to 1/254 of a head's largest difference.
        means: blocks left out count by one mean each, see
            :class:`~dit_accel.stages.compensate.residual.PooledResidual`, and the difference is what dense attention
            has beyond that, which is less.
    """

    lasts: float = 0.8
    bits: int = 16
    means: bool = False

    is_static: ClassVar[bool] = True
    watches_dense: ClassVar[bool] = True
    follows_step: ClassVar[bool] = True
    allows_pairs: ClassVar[bool] = True
    goes_round: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 < self.lasts <= 1.0:
            raise ValueError(f"compensate.lasts must be a share of the steps in (0, 1], got {self.lasts}.")
        if self.bits not in (8, 16):
            raise ValueError(f"compensate.bits must be 8 or 16, got {self.bits}.")

    @property
    def needs_lse(self) -> bool:  # type: ignore[override]
        """Means share a softmax with the kept keys."""
        return self.means

    def conflicts_with(self, select: Select) -> str | None:
        if select.is_dense:
            return "Carried adds what a selection leaves out, and a dense selection leaves nothing out."
        conflict = _MEANS.conflicts_with(select) if self.means else None
        return super().conflicts_with(select) if conflict is None else f"compensate.means: {conflict}"

    def choices(self, case: Case, backend: str) -> dict[Operation, Choice]:
        """The attention over means."""
        return _MEANS.choices(case, backend) if self.means else {}

    def left_out(self, call: AttentionCall, plan: AttentionPlan, dense: torch.Tensor, sparse: Sparse) -> LeftOut:
        """What a dense step keeps for :meth:`attend`."""
        out, _ = self._without(call, plan, sparse)
        if call.part is not None:  # of its slots, so that no later step has to send it there
            return LeftOut.of(call.step, call.part.queries.there(dense) - out, self.bits)
        return LeftOut.of(call.step, dense - call.of_queries(out), self.bits)

    def attend(self, call: AttentionCall, plan: AttentionPlan, sparse: Sparse) -> Attended:
        """Sparse attention and a share of the difference."""
        out, witness = self._without(call, plan, sparse)
        share = 0.0 if call.left_out is None else self._share(call, call.left_out)
        if share > 0.0:
            assert call.left_out is not None
            if torch.is_grad_enabled() and out.requires_grad:
                raise RuntimeError("Carried has no gradient; train with another compensation or without one.")
            # In place: padding and tokens that do not query have no difference.
            added_to = call.of_queries(out) if call.part is None else out
            call.left_out.add_to(added_to, share)
            if witness is not out:
                witness = witness + call.left_out.witness
        return out, witness

    def density(self, plan: AttentionPlan) -> torch.Tensor:
        """Kept share of all block pairs, with means as :class:`PooledResidual` counts them."""
        return _MEANS.density(plan) if self.means else super().density(plan)

    def work(self, kept: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """The same of some rows."""
        return _MEANS.work(kept, plan) if self.means else super().work(kept, plan)

    def _without(self, call: AttentionCall, plan: AttentionPlan, sparse: Sparse) -> Attended:
        """Attention before anything is added: to the kept blocks, and to means of the others."""
        return _MEANS.attend(call, plan, sparse) if self.means else sparse()

    def _share(self, call: AttentionCall, kept: LeftOut) -> float:
        now, then = call.step.progress, kept.made.progress
        if now is None or then is None:
            return 0.0
        return 1.0 - (now - then) / self.lasts
