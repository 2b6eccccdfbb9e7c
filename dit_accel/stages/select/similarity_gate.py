"""Pooled selection that trusts the mean of a block only where its tokens resemble each other (SpargeAttn)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ...call import AttentionCall
from ...kernels import BlockMask
from ...kernels.selection.api import pool_blocks, self_similarity
from ...kernels.selection.pairs import pooled_scores_under
from ...plan import LayerMemory, SequenceBlocks
from .pooled import keep_best
from .protocol import Select, check_block, check_share


@dataclass(frozen=True)
class GatedPooled(Select):
    """Pooled scores with a self-similarity gate (SpargeAttn, arXiv 2502.18137).

    A block whose tokens point in different directions has a mean that speaks for none of them: such a query
    block reads everything, and such a key block is read by all. Among the other key blocks the pooled score
    decides, as in :class:`~dit_accel.stages.select.pooled.Pooled`.

    Attributes:
        density: kept share of the self-similar latent key blocks, in (0, 1]; None to use ``top_p`` alone.
        top_p: softmax mass to keep, in (0, 1]; None to use ``density`` alone.
        similarity: a block is self-similar when the mean cosine of all its token pairs, each token with
            itself included, exceeds this; -1 or less turns the gate off.
        smooth_k: subtract the keys' mean over the sequence first. It changes no softmax, but the cosines.
        sink_first_frame: always read the blocks of the first latent frame.
        block: tokens in a query and in a key block.
    """

    density: float | None = None
    top_p: float | None = 0.98
    similarity: float = 0.6
    smooth_k: bool = True
    sink_first_frame: bool = False
    block: tuple[int, int] = (128, 64)
    has_density: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.density is None and self.top_p is None:
            raise ValueError("select needs a density, a top_p, or both; got neither.")
        check_share("density", self.density)
        check_share("top_p", self.top_p)
        if self.similarity >= 1.0:
            raise ValueError(f"select.similarity must be below 1, got {self.similarity}.")
        check_block(self.block)

    def with_density(self, density: float) -> GatedPooled:
        return replace(self, density=density)

    def select(
        self,
        blocks: SequenceBlocks,
        _tables: None,
        call: AttentionCall,
        _memory: LayerMemory | None = None,
    ) -> BlockMask:
        """Mask of one call from its queries and keys."""
        q, k, key_mask, rows = call.q, call.k, call.key_mask, blocks.kernel_rows
        backend = call.backend("selection")
        q_mean = pool_blocks(q, blocks.block_q, rows=rows, backend=backend)
        k_mean = pool_blocks(k, blocks.block_k, rows=rows, key_mask=key_mask, backend=backend)
        centre = _mean_token(k, key_mask) if self.smooth_k else None
        if centre is not None:
            k_mean = k_mean - centre[:, :, None]
        forced_q = forced_k = None
        if self.similarity > -1.0:
            forced_q = self_similarity(q, blocks.block_q, rows=rows, backend=backend) <= self.similarity
            similar = self_similarity(k, blocks.block_k, rows=rows, key_mask=key_mask, centre=centre, backend=backend)
            forced_k = similar <= self.similarity
        if self.sink_first_frame:
            first = blocks.first_frame_k
            forced_k = first if forced_k is None else forced_k | first
        scores = (q_mean * call.scale) @ k_mean.transpose(-1, -2)
        if call.seen is not None:
            keys = k if centre is None else k - centre[:, None].to(k.dtype)
            scores = pooled_scores_under(scores, q, keys, call.seen, rows=rows, scale=call.scale)
        return keep_best(
            blocks,
            scores,
            call.key_mask,
            density=self.density,
            top_p=self.top_p,
            forced_q=forced_q,
            forced_k=forced_k,
            hidden=call.hidden_blocks,
            backend=backend,
        )


def _mean_token(k: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over the visible tokens, float32 ``[B, H, D]``."""
    if key_mask is None:
        return k.mean(1, dtype=torch.float32)
    visible = key_mask[:, :, None, None]
    # where, not a product: a padded prompt may hold NaN.
    total = torch.where(visible, k, 0).sum(1, dtype=torch.float32)
    return total / visible.sum(1).clamp_min(1)
