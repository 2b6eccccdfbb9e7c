"""What a compensation offers to the engine."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch

from ...call import AttentionCall
from ...kernels import BlockMask
from ...kernels.attention.means import LeftOutMeans
from ...kernels.common.choice import Case, Choice, Operation
from ...plan import AttentionPlan, LayerMemory, LeftOut, SequenceBlocks
from ..select.protocol import Select
from .learned import LearnedCompensation, LearnedGate

Attended = tuple[torch.Tensor, torch.Tensor]
"""Output (B, S, H, D), and a tensor with a NaN wherever the output has one."""


class Sparse(Protocol):
    """What computes the attention of a call over its kept blocks."""

    def __call__(self, means: LeftOutMeans | None = None) -> Attended:
        """Output and witness. With ``means`` both are of one softmax over kept blocks and means, and the witness is its
        log-sum-exp: in one launch where a kernel can."""
        ...


class Compensation(Protocol):
    """What is added to, or replaces, the sparse attention over the kept blocks.

    A kind inherits from this class, and says where it differs from what stands here.

    Attributes:
        is_static: nothing has to be worked out from queries and keys.
        is_learned: it has parameters in each layer, see :meth:`build`.
        reads_input: they are of the layer's input, see :meth:`build_gate`, and :meth:`attend` finds what they made of
            it at the call's ``gate``.
        needs_lse: the second tensor of ``sparse()`` must be the log-sum-exp, float32 ``[B, H, S]``.
        attends_alone: ``sparse()`` is never called.
        allows_pairs: queries may see different keys; else such calls stay dense.
        spans_references: it knows grids of references too; else these read and are read in full.
        watches_dense: it keeps something of the dense steps in which plans are made, see :meth:`left_out`.
        follows_step: what it does depends on the step, beside the plan.
        goes_round: it can stand in where processes around a ring share the tokens of a call, whose queries, keys and
            output are then of this process' slots.
        whole: what it does with the whole sequence where it cannot, the predicate of a sentence.
    """

    is_static: ClassVar[bool] = False
    is_learned: ClassVar[bool] = False
    reads_input: ClassVar[bool] = False
    needs_lse: ClassVar[bool] = False
    attends_alone: ClassVar[bool] = False
    allows_pairs: ClassVar[bool] = False
    spans_references: ClassVar[bool] = True
    watches_dense: ClassVar[bool] = False
    follows_step: ClassVar[bool] = False
    goes_round: ClassVar[bool] = False
    whole: ClassVar[str] = "looks at single tokens of the whole sequence"

    def conflicts_with(self, select: Select) -> str | None:
        """A sentence that says why it cannot stand in for what a selection leaves out; None where it can."""
        if select.is_static and not self.is_static:
            return (
                f"{type(self).__name__} follows the queries and keys of a call and needs a "
                f"selection that does so too, got {type(select).__name__}."
            )
        return None

    def choices(self, case: Case, backend: str) -> dict[Operation, Choice]:
        """The backend of each operation that this compensation runs, see
        :meth:`dit_accel.stages.select.protocol.Select.choices`."""
        return {}

    def prepare(
        self, blocks: SequenceBlocks, mask: BlockMask, call: AttentionCall, memory: LayerMemory | None = None
    ) -> Any:
        """What a plan keeps for :meth:`attend`.

        ``memory`` may hold what the selection of this plan found on its way.
        """
        return None

    def narrow(self, call: AttentionCall, plan: AttentionPlan) -> AttentionPlan:
        """What is run of a plan, which may serve many calls, in this one."""
        return plan

    def attend(self, call: AttentionCall, plan: AttentionPlan, sparse: Sparse) -> Attended:
        """Attention of a call; ``sparse`` computes that over the kept blocks alone."""
        return sparse()

    def left_out(self, call: AttentionCall, plan: AttentionPlan, dense: torch.Tensor, sparse: Sparse) -> LeftOut:
        """What later calls of the layer and branch find at their ``left_out``, where :attr:`watches_dense`.

        ``dense`` is the attention of the tokens that query, and ``sparse`` computes that over the kept blocks.
        """
        raise TypeError(f"{type(self).__name__} does not watch dense steps.")

    def density(self, plan: AttentionPlan) -> torch.Tensor:
        """Share of the work of dense attention, a 0-d tensor: here that of the kept block pairs."""
        return plan.density

    def work(self, kept: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """:meth:`density` of some rows of a plan that keep the share ``kept`` of their block pairs: around a ring each
        process has some."""
        return kept

    def build(self, heads: int, head_dim: int) -> LearnedCompensation:
        """The learned part of one layer, which adds to what :meth:`attend` returns."""
        raise TypeError(f"{type(self).__name__} has nothing to learn.")

    def build_gate(self, heads: int, head_dim: int, width: int) -> LearnedGate:
        """The learned part of one layer whose input has ``width`` features, where :attr:`reads_input`."""
        raise TypeError(f"{type(self).__name__} has no gate.")
