"""Attention among block means beside that over the kept blocks: Video Sparse Attention (arXiv 2505.13389)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from ...call import AttentionCall
from ...kernels import BlockMask
from ...kernels.coarse.api import SharedBlocks, add_coarse_attention, choose_coarse
from ...kernels.common.choice import Case, Choice, Operation
from ...plan import AttentionPlan, LayerMemory, SequenceBlocks
from ...ring import RingPart
from ..select.means import own_key_mask
from ..select.protocol import Select
from .learned import LearnedGate, gate_of_latents
from .protocol import Attended, Compensation, Sparse


@dataclass(frozen=True)
class CoarseBranch(Compensation):
    """Every block also attends among block means, through a learned gate (VSA, arXiv 2505.13389).

    ``out = sparse + gate * coarse`` with ``coarse = softmax(Qc Kc^T / sqrt(D)) Vc`` of the means of each block, the
    same for all of its tokens, and ``gate = W x + b`` of the attention layer's input ``x``, a number for every feature
    of every head. The gate is zero at the start: an untrained branch adds nothing. As in the released code
    (github.com/hao-ai-lab/FastVideo) the sparse branch has no gate of its own.

    Blocks with a token that is no latent take no part, and their tokens get nothing. The gate has as many parameters as
    the query projection, and stays in float32.
    """

    is_static: ClassVar[bool] = True
    is_learned: ClassVar[bool] = True
    reads_input: ClassVar[bool] = True
    spans_references: ClassVar[bool] = False
    goes_round: ClassVar[bool] = True

    def conflicts_with(self, select: Select) -> str | None:
        """Queries and keys share their blocks."""
        block_q, block_k = select.block
        if block_q != block_k and not select.is_dense:
            return f"CoarseBranch needs blocks of as many queries as keys, got select.block {select.block}."
        return super().conflicts_with(select)

    def choices(self, case: Case, backend: str) -> dict[Operation, Choice]:
        """The coarse branch."""
        return {"coarse": choose_coarse(case, backend)}

    def prepare(
        self,
        blocks: SequenceBlocks,
        _mask: BlockMask,
        _call: AttentionCall,
        _memory: LayerMemory | None = None,
    ) -> torch.Tensor | None:
        """Blocks with other tokens than latents, bool ``[B|1, H|1, nk]``; or None."""
        return blocks.forced_k

    def attend(self, call: AttentionCall, plan: AttentionPlan, sparse: Sparse) -> Attended:
        """The sparse attention plus the gated coarse one."""
        out, witness = sparse()
        gate, first = gate_of_latents(call)
        call.backend("coarse")  # torch whatever its name: there is nothing to hand it to
        out = add_coarse_attention(
            out,
            call.q,
            call.k,
            call.v,
            gate,
            block=plan.mask.block_k,
            rows=plan.rows if call.part is None else None,
            key_mask=own_key_mask(call),
            closed=plan.compensation,
            first=first,
            scale=call.scale,
            backend=call.backend("selection"),
            shared=None if call.part is None else _shared(call, call.part),
        )
        return out, witness

    def build_gate(self, heads: int, head_dim: int, width: int) -> LearnedGate:
        """The gate of one layer, zero."""
        return LearnedGate(heads, head_dim, width)


def _shared(call: AttentionCall, part: RingPart) -> SharedBlocks:
    """Means of keys are gathered around a ring, keys never."""
    of_keys = partial(part.ring.gather_with_gradient, dim=2, lengths=part.k_counts)
    return SharedBlocks(of_keys, part.q_span(), part.mask_at(part.queries_here(), call.key_mask))
