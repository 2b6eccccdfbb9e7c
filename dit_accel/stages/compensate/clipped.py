"""Weights of the softmax that are clipped, by learned bounds: Quantizable Transformers (arXiv 2306.12929)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ...call import AttentionCall
from ...kernels.attention.clipped import choose_clipped, clipping_change
from ...kernels.common.choice import Case, Choice, Operation
from ...plan import AttentionPlan
from ..select.protocol import Select
from .learned import LearnedCompensation
from .protocol import Compensation


@dataclass(frozen=True)
class ClippedSoftmax(Compensation):
    """Nothing stands in for what is left out; small weights of the kept keys become none.

    ``clip((zeta - gamma) P + gamma, 0, 1)`` in place of the softmax's weights ``P``, with ``gamma = -alpha / n`` for a
    query that sees ``n`` keys, and a number ``alpha`` for each head, learned (the paper's is fixed). A head whose
    weights are all small then writes exactly nothing, for which a softmax needs logits without bound: these make the
    outliers that 8 bits cannot hold. With ``alpha = 0`` and ``zeta = 1`` the weights are those of the softmax.

    A reference form: what clipping changes is computed in torch beside the kernel, in the model's dtype, and costs
    more than the kernel. In 8 bits the output so has the error of the 8-bit softmax, no more. Around a ring each
    process gathers keys and values of all for it, as a dense call does.

    Attributes:
        alpha: of every head before training, at least 0; about so many times the mean weight are taken off.
        zeta: at least 1; the paper finds that it matters little.
    """

    alpha: float = 0.0
    zeta: float = 1.0

    def __post_init__(self) -> None:
        if not self.alpha >= 0.0:
            raise ValueError(f"compensate.alpha must be at least 0, got {self.alpha}.")
        if not self.zeta >= 1.0:
            raise ValueError(f"compensate.zeta must be at least 1, got {self.zeta}.")

    is_static: ClassVar[bool] = True
    is_learned: ClassVar[bool] = True
    allows_pairs: ClassVar[bool] = True
    goes_round: ClassVar[bool] = True

    def conflicts_with(self, select: Select) -> str | None:
        """A dense selection runs the model's own attention."""
        if select.is_dense:
            return (
                "ClippedSoftmax acts on this package's attention, and a dense selection runs the model's own; "
                "use select 'full' to clip weights of every block."
            )
        return super().conflicts_with(select)

    def choices(self, case: Case, backend: str) -> dict[Operation, Choice]:
        """The clipping."""
        return {"clipped_softmax": choose_clipped(case, backend)}

    def build(self, heads: int, _head_dim: int) -> LearnedCompensation:
        """The numbers of one layer's heads."""
        return ClippedSoftmaxLayer(self, heads)


class ClippedSoftmaxLayer(LearnedCompensation):
    """The learned part of :class:`ClippedSoftmax` for one attention layer: ``alpha [H]``, of which less than 0 is 0."""

    def __init__(self, choice: ClippedSoftmax, heads: int) -> None:
        super().__init__()
        self.choice = choice
        self.alpha = nn.Parameter(torch.full((heads,), float(choice.alpha)))

    def per_head(self) -> tuple[str, ...]:
        return ("alpha",)

    def forward(self, out: torch.Tensor, call: AttentionCall, plan: AttentionPlan) -> torch.Tensor:
        """See :meth:`LearnedCompensation.forward`."""
        call.backend("clipped_softmax")  # torch whatever its name: there is nothing to hand it to
        # Straight through the bound, or a head that has come below it could not leave it.
        alpha = self.alpha + (self.alpha.clamp(min=0.0) - self.alpha).detach()
        k, v, mask, rows, key_mask = call.k, call.v, plan.mask, plan.rows, call.key_mask
        if call.part is not None:
            # A weight is clipped by the sum of all, which keys that go round would have to bring once more.
            part, whole = call.part, slice(0, plan.mask.num_blocks[1])
            lengths = [part.key_slots(rank) for rank in range(part.ring.size)]
            k, v = (part.ring.gather_with_gradient(x, 1, lengths) for x in (k, v))
            mask = mask.parts(part.q_span(), [whole], call.backend("selection"))[0]
            rows, key_mask = None, part.mask_at(slice(0, part.total), key_mask)
        zeta, scale = self.choice.zeta, call.scale
        change = clipping_change(call.q, k, v, mask, alpha, zeta=zeta, rows=rows, key_mask=key_mask, scale=scale)
        return out + change
