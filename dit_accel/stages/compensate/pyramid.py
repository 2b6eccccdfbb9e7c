"""Left-out blocks at a lower resolution: the pyramid of keys of PSA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...call import AttentionCall
from ...kernels import BlockMask
from ...kernels.common.choice import Case, Choice, Operation
from ...kernels.pyramid.api import choose_pyramid, pyramid_attention
from ...kernels.pyramid.levels import check_cumulative, energy_levels, similarity_cap
from ...plan import AttentionPlan, LayerMemory, SequenceBlocks
from ..select.pooled import candidates
from ..select.sampled import SampledMass, choose_sampled, sampled_importance
from .protocol import Attended, Compensation, Sparse


@dataclass(frozen=True)
class KeyPyramid(Compensation):
    """Left-out blocks are read at a lower resolution, as means of 2, 4 or 8 neighbouring keys (PSA).

    Blocks that the selection keeps are read in full. Of the others, those up to the first bound of the
    cumulative sampled importance of a row are read in full too, up to the second at level 2, then 4 and 8;
    beyond the last bound they are left out. All levels share one softmax. Gradients reach queries, keys and values
    through the means and the denominators; levels have none. On a GPU kernels compute them; elsewhere a torch path
    that computes every logit, in pieces: linear memory, no gain in speed.

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

    attends_alone: ClassVar[bool] = True
    whole: ClassVar[str] = "samples single keys of the whole sequence"

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

    def attend(self, call: AttentionCall, plan: AttentionPlan, _sparse: Sparse) -> Attended:
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
