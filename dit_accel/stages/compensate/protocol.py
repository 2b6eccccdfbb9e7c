"""What stands in for the key blocks left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from ...call import AttentionCall
from ...kernels import BlockMask
from ...kernels.common.choice import Case, Choice, Operation
from ...kernels.pyramid.api import choose_pyramid, pyramid_attention
from ...kernels.pyramid.levels import check_cumulative, energy_levels, similarity_cap
from ...kernels.selection.rectified import add_pooled_compensation, choose_rectified, gain_exceeds_error
from ...plan import AttentionPlan, LayerMemory, SequenceBlocks
from ..select.pooled import candidates
from ..select.rectified import PooledShares, pooled_shares
from ..select.sampled import SampledMass, choose_sampled, sampled_importance
from .agent import AgentTokens
from .linear import LinearBranch
from .residual import PooledResidual

Attended = tuple[torch.Tensor, torch.Tensor]
"""Output (B, S, H, D), and a tensor with a NaN wherever the output has one."""


class Compensation(Protocol):
    """What is added to, or replaces, the sparse attention over the kept blocks.

    Attributes:
        needs_lse: the second tensor of ``sparse()`` must be the log-sum-exp, float32 ``[B, H, S]``.
        attends_alone: ``sparse()`` is never called.
        allows_pairs: queries may see different keys; else such calls stay dense.
        spans_references: it knows grids of references too; else these read and are read in full.
    """

    needs_lse: ClassVar[bool]
    attends_alone: ClassVar[bool]
    spans_references: ClassVar[bool]
    allows_pairs: ClassVar[bool]

    @property
    def is_static(self) -> bool:
        """Whether nothing has to be worked out from queries and keys."""
        ...

    def choices(self, case: Case, backend: str) -> dict[Operation, Choice]:
        """The backend of each operation that this compensation runs, see
        :meth:`dit_accel.stages.select.protocol.Select.choices`."""
        ...

    def prepare(
        self,
        blocks: SequenceBlocks,
        mask: BlockMask,
        call: AttentionCall,
        memory: LayerMemory | None = None,
    ) -> Any:
        """What a plan keeps for :meth:`attend`.

        ``memory`` may hold what the selection of this plan found on its way.
        """
        ...

    def attend(self, call: AttentionCall, plan: AttentionPlan, sparse: Callable[[], Attended]) -> Attended:
        """Attention of a call; ``sparse`` computes that over the kept blocks alone."""
        ...

    def density(self, plan: AttentionPlan) -> torch.Tensor:
        """Share of the work of dense attention, a 0-d tensor."""
        ...


@dataclass(frozen=True)
class NoCompensation:
    """Left-out blocks are left out: the softmax runs over the kept keys alone."""

    needs_lse: ClassVar[bool] = False
    attends_alone: ClassVar[bool] = False
    spans_references: ClassVar[bool] = True
    allows_pairs: ClassVar[bool] = True

    @property
    def is_static(self) -> bool:
        return True

    def choices(self, case: Case, backend: str) -> dict[Operation, Choice]:
        """None: nothing is added."""
        return {}

    def prepare(
        self,
        blocks: SequenceBlocks,
        mask: BlockMask,
        call: AttentionCall,
        memory: LayerMemory | None = None,
    ) -> None:
        """Nothing to keep."""

    def attend(self, call: AttentionCall, plan: AttentionPlan, sparse: Callable[[], Attended]) -> Attended:
        """The sparse attention as it is."""
        return sparse()

    def density(self, plan: AttentionPlan) -> torch.Tensor:
        """Kept share of all block pairs."""
        return plan.mask.density()


@dataclass(frozen=True)
class PooledMass:
    """Left-out blocks give their mean value, weighted by pooled attention (Rectified SpaAttn).

    ``out = R * sparse + sum of p_J mean(V_J)`` over the compensated blocks J, with p the reallocated shares
    of :func:`~dit_accel.stages.select.rectified.pooled_shares` and R the rest of the mass (arXiv
    2511.19835). A plan that is reused keeps its shares. Inference only.

    Attributes:
        gain_aware: compensate only blocks whose pooled logit exceeds the error that pooling may make; the
            mass of the others goes to the sparse output.
    """

    gain_aware: bool = True

    needs_lse: ClassVar[bool] = False
    attends_alone: ClassVar[bool] = False
    spans_references: ClassVar[bool] = True
    allows_pairs: ClassVar[bool] = False

    @property
    def is_static(self) -> bool:
        return False

    def choices(self, case: Case, backend: str) -> dict[Operation, Choice]:
        """The gains and the sum."""
        return {"rectified": choose_rectified(case, backend)}

    def prepare(
        self,
        blocks: SequenceBlocks,
        mask: BlockMask,
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

    def attend(self, call: AttentionCall, plan: AttentionPlan, sparse: Callable[[], Attended]) -> Attended:
        """The sparse attention, scaled, plus the pooled one."""
        _refuse_gradients(call.q, call.k, call.v)
        out, witness = sparse()
        shares, gains = plan.compensation
        add_pooled_compensation(
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

    def density(self, plan: AttentionPlan) -> torch.Tensor:
        """Kept share of all block pairs; the pooled part is not counted."""
        return plan.mask.density()


@dataclass(frozen=True)
class KeyPyramid:
    """Left-out blocks are read at a lower resolution, as means of 2, 4 or 8 neighbouring keys (PSA).

    Blocks that the selection keeps are read in full. Of the others, those up to the first bound of the
    cumulative sampled importance of a row are read in full too, up to the second at level 2, then 4 and 8;
    beyond the last bound they are left out. All levels share one softmax. Gradients go through a torch
    path that computes every logit, in pieces: linear memory, no gain in speed.

    Attributes:
        cumulative: bounds of levels 1, 2, 4 and 8, non-decreasing shares in [0, 1].
        similarity: mean cosine of a block's keys that levels 2, 4 and 8 each need; empty turns this off.
        share: sampled share of a block's tokens.
        seed: of the sample.
    """

    cumulative: tuple[float, float, float, float] = (0.5, 0.6, 0.7, 0.8)
    similarity: tuple[float, ...] = (0.7, 0.65, 0.6)
    share: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        check_cumulative(self.cumulative)
        if len(self.similarity) not in (0, 3):
            raise ValueError(f"compensate.similarity must be empty or three cosines, got {self.similarity}.")
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"compensate.share must lie in (0, 1], got {self.share}.")

    needs_lse: ClassVar[bool] = False
    attends_alone: ClassVar[bool] = True
    spans_references: ClassVar[bool] = True
    allows_pairs: ClassVar[bool] = False

    @property
    def is_static(self) -> bool:
        return False

    def choices(self, case: Case, backend: str) -> dict[Operation, Choice]:
        """The attention over all levels; the sample that chooses them."""
        return {
            "block_mass": choose_sampled(case, self.share, backend),
            "pyramid": choose_pyramid(case, backend),
        }

    def prepare(
        self,
        blocks: SequenceBlocks,
        mask: BlockMask,
        call: AttentionCall,
        memory: LayerMemory | None = None,
    ) -> torch.Tensor:
        """Levels, int8 ``[B, H, nq, nk]``."""
        found = memory.found if memory is not None else None
        if isinstance(found, SampledMass) and (found.share, found.seed) == (self.share, self.seed):
            importance = found.mass
        else:
            importance = sampled_importance(
                call.q,
                call.k,
                blocks.block_q,
                blocks.block_k,
                rows=blocks.kernel_rows,
                key_mask=call.key_mask,
                scale=call.scale,
                backend=call.backend("block_mass"),
                share=self.share,
                seed=self.seed,
            )
        open_k = candidates(blocks, call.key_mask)[..., None, :]
        levels = energy_levels(importance.masked_fill(~open_k, 0.0), self.cumulative, min_full=0.0)
        if self.similarity:
            low, middle, high = self.similarity
            cap = similarity_cap(
                call.k,
                blocks.block_k,
                rows=blocks.kernel_rows,
                thresholds=(low, middle, high),
                backend=call.backend("selection"),
            )
            levels = levels.minimum(cap[:, :, None])
        levels = levels.masked_fill(~open_k, 0)
        return levels.masked_fill(mask.to_dense(), 1)

    def attend(self, call: AttentionCall, plan: AttentionPlan, sparse: Callable[[], Attended]) -> Attended:
        """One softmax over all levels."""
        result = pyramid_attention(
            call.q,
            call.k,
            call.v,
            plan.compensation,
            block_q=plan.mask.block_q,
            block_k=plan.mask.block_k,
            rows=plan.rows,
            key_mask=call.key_mask,
            scale=call.scale,
            return_lse=True,
            backend=call.backend("pyramid"),
        )
        assert isinstance(result, tuple)
        return result

    def density(self, plan: AttentionPlan) -> torch.Tensor:
        """Keys read, means counted as one, as a share of all."""
        levels = plan.compensation
        return torch.where(levels > 0, 1.0 / levels.clamp_min(1), 0.0).mean()


def _refuse_gradients(*tensors: torch.Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError("This compensation has no gradient; train with another or without one.")


COMPENSATIONS: dict[str, type[Compensation]] = {
    "none": NoCompensation,
    "pooled_mass": PooledMass,
    "key_pyramid": KeyPyramid,
    "linear": LinearBranch,
    "agents": AgentTokens,
    "residual": PooledResidual,
}
