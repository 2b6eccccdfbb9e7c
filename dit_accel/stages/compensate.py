"""What stands in for the key blocks left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from ..kernels import BlockMask
from ..kernels.pyramid import pyramid_attention
from ..kernels.pyramid_levels import check_cumulative, energy_levels, similarity_cap
from ..kernels.rectified import add_pooled_compensation, gain_exceeds_error
from ..plan import AttentionPlan, LayerMemory, SequenceBlocks
from .compensate_agent import AgentTokens
from .compensate_linear import LinearBranch
from .compensate_residual import PooledResidual
from .select_dynamic import candidates
from .select_rectified import PooledShares, pooled_shares
from .select_sampled import SampledMass, sampled_importance

Attended = tuple[torch.Tensor, torch.Tensor]
"""Output (B, S, H, D), and a tensor with a NaN wherever the output has one."""


class Compensation(Protocol):
    """What is added to, or replaces, the sparse attention over the kept blocks.

    Attributes:
        needs_lse: the second tensor of ``sparse()`` must be the log-sum-exp, float32 ``[B, H, S]``.
    """

    needs_lse: ClassVar[bool]

    @property
    def is_static(self) -> bool:
        """Whether nothing has to be worked out from queries and keys."""
        ...

    def prepare(
        self,
        blocks: SequenceBlocks,
        mask: BlockMask,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None,
        scale: float | None,
        memory: LayerMemory | None = None,
    ) -> Any:
        """What a plan keeps for :meth:`attend`, from queries and keys (B, S, H, D).

        ``memory`` may hold what the selection of this plan found on its way.
        """
        ...

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: AttentionPlan,
        key_mask: torch.Tensor | None,
        scale: float | None,
        sparse: Callable[[], Attended],
    ) -> Attended:
        """Attention of (B, S, H, D) tensors; ``sparse`` computes that over the kept blocks alone."""
        ...

    def density(self, plan: AttentionPlan) -> torch.Tensor:
        """Share of the work of dense attention, a 0-d tensor."""
        ...


@dataclass(frozen=True)
class NoCompensation:
    """Left-out blocks are left out: the softmax runs over the kept keys alone."""

    needs_lse: ClassVar[bool] = False

    @property
    def is_static(self) -> bool:
        return True

    def prepare(
        self,
        blocks: SequenceBlocks,
        mask: BlockMask,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None,
        scale: float | None,
        memory: LayerMemory | None = None,
    ) -> None:
        """Nothing to keep."""

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: AttentionPlan,
        key_mask: torch.Tensor | None,
        scale: float | None,
        sparse: Callable[[], Attended],
    ) -> Attended:
        """The sparse attention as it is."""
        return sparse()

    def density(self, plan: AttentionPlan) -> torch.Tensor:
        """Kept share of all block pairs."""
        return plan.mask.density()


@dataclass(frozen=True)
class PooledMass:
    """Left-out blocks give their mean value, weighted by pooled attention (Rectified SpaAttn).

    ``out = R * sparse + sum of p_J mean(V_J)`` over the compensated blocks J, with p the reallocated shares
    of :func:`~dit_accel.stages.select_rectified.pooled_shares` and R the rest of the mass (arXiv
    2511.19835). A plan that is reused keeps its shares. Inference only.

    Attributes:
        gain_aware: compensate only blocks whose pooled logit exceeds the error that pooling may make; the
            mass of the others goes to the sparse output.
    """

    gain_aware: bool = True

    needs_lse: ClassVar[bool] = False

    @property
    def is_static(self) -> bool:
        return False

    def prepare(
        self,
        blocks: SequenceBlocks,
        mask: BlockMask,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None,
        scale: float | None,
        memory: LayerMemory | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Shares, float32 ``[B, H, nq, nk]``, and which blocks may be compensated."""
        found = memory.found if memory is not None else None
        pooled = found if isinstance(found, PooledShares) else pooled_shares(blocks, q, k, key_mask, scale)
        if not self.gain_aware:
            return pooled.blocks, None
        gains = gain_exceeds_error(
            q,
            k,
            blocks.block_q,
            blocks.block_k,
            rows=blocks.kernel_rows,
            key_mask=key_mask,
            means=(pooled.q_mean, pooled.k_mean),
        )
        return pooled.blocks, gains

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: AttentionPlan,
        key_mask: torch.Tensor | None,
        scale: float | None,
        sparse: Callable[[], Attended],
    ) -> Attended:
        """The sparse attention, scaled, plus the pooled one."""
        _refuse_gradients(q, k, v)
        out, witness = sparse()
        shares, gains = plan.compensation
        add_pooled_compensation(out, v, shares, plan.mask, gains, rows=plan.rows, key_mask=key_mask)
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

    @property
    def is_static(self) -> bool:
        return False

    def prepare(
        self,
        blocks: SequenceBlocks,
        mask: BlockMask,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None,
        scale: float | None,
        memory: LayerMemory | None = None,
    ) -> torch.Tensor:
        """Levels, int8 ``[B, H, nq, nk]``."""
        found = memory.found if memory is not None else None
        if isinstance(found, SampledMass) and (found.share, found.seed) == (self.share, self.seed):
            importance = found.mass
        else:
            importance = sampled_importance(
                q,
                k,
                blocks.block_q,
                blocks.block_k,
                rows=blocks.kernel_rows,
                key_mask=key_mask,
                scale=scale,
                share=self.share,
                seed=self.seed,
            )
        open_k = candidates(blocks, key_mask)[..., None, :]
        levels = energy_levels(importance.masked_fill(~open_k, 0.0), self.cumulative, min_full=0.0)
        if self.similarity:
            low, middle, high = self.similarity
            cap = similarity_cap(k, blocks.block_k, rows=blocks.kernel_rows, thresholds=(low, middle, high))
            levels = levels.minimum(cap[:, :, None])
        levels = levels.masked_fill(~open_k, 0)
        return levels.masked_fill(mask.to_dense(), 1)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: AttentionPlan,
        key_mask: torch.Tensor | None,
        scale: float | None,
        sparse: Callable[[], Attended],
    ) -> Attended:
        """One softmax over all levels."""
        result = pyramid_attention(
            q,
            k,
            v,
            plan.compensation,
            block_q=plan.mask.block_q,
            block_k=plan.mask.block_k,
            rows=plan.rows,
            key_mask=key_mask,
            scale=scale,
            return_lse=True,
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
