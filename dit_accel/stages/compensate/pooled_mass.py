"""Means of left-out blocks, weighted by pooled attention: Rectified SpaAttn (arXiv 2511.19835)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...call import AttentionCall
from ...kernels import BlockMask
from ...kernels.common.choice import Case, Choice, Operation
from ...kernels.selection.rectified import add_pooled_compensation, choose_rectified, gain_exceeds_error
from ...plan import AttentionPlan, LayerMemory, SequenceBlocks
from ..select.rectified import PooledShares, pooled_shares
from .protocol import Attended, Compensation, Sparse


@dataclass(frozen=True)
class PooledMass(Compensation):
    """Left-out blocks give their mean value, weighted by pooled attention (Rectified SpaAttn).

    ``out = R * sparse + sum of p_J mean(V_J)`` over the compensated blocks J, with p the reallocated shares
    of :func:`~dit_accel.stages.select.rectified.pooled_shares` and R the rest of the mass (arXiv
    2511.19835). A plan that is reused keeps its shares, and to gradients they are constants, as the choice of blocks
    is: queries and keys have theirs through the sparse attention, values through the means too.

    Attributes:
        gain_aware: compensate only blocks whose pooled logit exceeds the error that pooling may make; the
            mass of the others goes to the sparse output.
    """

    gain_aware: bool = True

    whole: ClassVar[str] = "weighs means of blocks beside single tokens of the whole sequence"

    def choices(self, case: Case, backend: str) -> dict[Operation, Choice]:
        """The gains and the sum."""
        return {"rectified": choose_rectified(case, backend)}

    def prepare(
        self,
        blocks: SequenceBlocks,
        _mask: BlockMask,
        call: AttentionCall,
        memory: LayerMemory | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Shares, float32 ``[B, H, nq, nk]``, and which blocks may be compensated."""
        found = memory.found if memory is not None else None
        pooled = found if isinstance(found, PooledShares) else pooled_shares(blocks, call)
        if not self.gain_aware:
            return pooled.blocks, None
        gains = gain_exceeds_error(
            call.q,
            call.k,
            blocks.block_q,
            blocks.block_k,
            rows=blocks.kernel_rows,
            key_mask=call.key_mask,
            backend=call.backend("rectified"),
            means=(pooled.q_mean, pooled.k_mean),
        )
        return pooled.blocks, gains

    def attend(self, call: AttentionCall, plan: AttentionPlan, sparse: Sparse) -> Attended:
        """The sparse attention, scaled, plus the pooled one."""
        out, witness = sparse()
        shares, gains = plan.compensation
        out = add_pooled_compensation(
            out,
            call.v,
            shares,
            plan.mask,
            gains,
            rows=plan.rows,
            key_mask=call.key_mask,
            backend=call.backend("rectified"),
        )
        return out, witness
