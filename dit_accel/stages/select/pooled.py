"""Key blocks chosen from the queries and keys of the call itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ...call import AttentionCall
from ...heads import HeadShard
from ...kernels import BlockMask
from ...kernels.selection.api import own_blocks, pooled_scores, select_blocks
from ...kernels.selection.pairs import pooled_scores_under
from ...plan import LayerMemory, SequenceBlocks
from .means import key_means, query_means
from .protocol import (
    WHOLE_BLOCK_SIZES,
    HeadDensities,
    Select,
    check_block,
    check_head_densities,
    check_share,
    density_of_layer,
    shares_per_head,
)


def keep_best(
    blocks: SequenceBlocks,
    scores: torch.Tensor,
    key_mask: torch.Tensor | None,
    *,
    density: float | torch.Tensor | None = None,
    top_p: float | torch.Tensor | None = None,
    forced_q: torch.Tensor | None = None,
    forced_k: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    keep_own: bool = True,
    backend: str = "auto",
) -> BlockMask:
    """Mask of the best key blocks by ``scores [B, H, nq, nk]``; text, own and forced blocks are always kept.

    Args:
        density, top_p: share to keep, or one per head, see
            :func:`~dit_accel.kernels.selection.api.select_blocks`.
        forced_q, forced_k: bool ``[B|1, H|1, nq]`` and ``[..., nk]``: further blocks that read everything,
            and that everything reads.
        hidden: bool ``[B|1, H|1, nq, nk]``: pairs of blocks that see nothing of each other, and are no choice.
        keep_own: whether a block reads itself in any case.
        backend: of the choice, one of :data:`~dit_accel.kernels.BACKENDS`.
    """
    partial_k, empty_k = (None, None) if key_mask is None else blocks.hidden_k(key_mask)
    return select_blocks(
        scores,
        density=density,
        top_p=top_p,
        forced_q=either(blocks.forced_q, forced_q),
        forced_k=either(blocks.forced_k, forced_k),
        partial_k=partial_k,
        empty_k=empty_k,
        hidden=hidden,
        keep_own=keep_own,
        block_q=blocks.block_q,
        block_k=blocks.block_k,
        q_len=blocks.layout.seq_len,
        kv_len=blocks.layout.seq_len,
        backend=backend,
    )


def pooled_scores_of(blocks: SequenceBlocks, call: AttentionCall, scale: float) -> torch.Tensor:
    """Logits of the block means of a call, float32 ``[B, H, nq, nk]``."""
    if call.part is not None:
        return (query_means(blocks, call) * scale) @ key_means(blocks, call).transpose(-1, -2)
    scores = pooled_scores(
        call.q,
        call.k,
        blocks.block_q,
        blocks.block_k,
        rows=blocks.kernel_rows,
        key_mask=call.key_mask,
        scale=scale,
        backend=call.backend("selection"),
    )
    if call.seen is None:
        return scores
    return pooled_scores_under(scores, call.q, call.k, call.seen, rows=blocks.kernel_rows, scale=scale)


def keep_chosen(
    blocks: SequenceBlocks, chosen: torch.Tensor, key_mask: torch.Tensor | None, backend: str = "auto"
) -> BlockMask:
    """Mask of the ``chosen`` pairs, bool ``[B, H, nq, nk]``, with text and own blocks, without empty ones."""
    seq_len = blocks.layout.seq_len
    keep = chosen | own_blocks(blocks.block_q, blocks.block_k, seq_len, seq_len, blocks.device)
    if blocks.forced_q is not None and blocks.forced_k is not None:
        keep = keep | blocks.forced_q[..., None] | blocks.forced_k[..., None, :]
    partial = None
    if key_mask is not None:
        some_hidden, all_hidden = blocks.hidden_k(key_mask)
        partial = some_hidden[..., None, :]
        keep = keep & ~all_hidden[..., None, :]
    return BlockMask.from_dense(
        keep, blocks.block_q, blocks.block_k, seq_len, seq_len, partial=partial, backend=backend
    )


def candidates(blocks: SequenceBlocks, key_mask: torch.Tensor | None) -> torch.Tensor:
    """bool ``[B|1, H|1, nk]``: key blocks to choose from, without other tokens than latents and not empty."""
    return blocks.open_k if key_mask is None else blocks.open_k & ~blocks.hidden_k(key_mask)[1]


def either(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    """Union of two masks, of which any may be missing."""
    if one is None or other is None:
        return other if one is None else one
    return one | other


@dataclass(frozen=True)
class Pooled(Select):
    """Score a pair of blocks by the dot product of their mean query and mean key; keep the best key blocks.

    The score of SpargeAttn (arXiv 2502.18137), SLA (arXiv 2509.24006) and others. Per query block the
    ``density`` share of the key blocks with the highest score is kept, or the fewest blocks whose softmax
    mass reaches ``top_p``; with both, the union. A block always reads itself, and text blocks are always
    read.

    Attributes:
        density: kept share of the latent key blocks, in (0, 1]; None to use ``top_p`` alone.
        top_p: softmax mass to keep, in (0, 1]; None to use ``density`` alone.
        sink_first_frame: always read the blocks of the first latent frame.
        block: tokens in a query and in a key block.
        head_densities: in place of ``density``, a share per layer and in it per head; a single layer's entry
            serves all layers. :func:`~dit_accel.calibration.allocation.allocate` finds them.
        keep_own: a block always reads itself, besides the best; False leaves that to its score.
    """

    density: float | None = 0.2
    top_p: float | None = None
    sink_first_frame: bool = False
    block: tuple[int, int] = (128, 64)
    head_densities: HeadDensities = ()
    keep_own: bool = True
    has_density: ClassVar[bool] = True
    has_head_densities: ClassVar[bool] = True
    of_call_alone: ClassVar[bool] = True
    goes_round: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.density is None and self.top_p is None:
            raise ValueError("select needs a density, a top_p, or both; got neither.")
        check_share("density", self.density)
        check_share("top_p", self.top_p)
        check_block(self.block, WHOLE_BLOCK_SIZES)
        check_head_densities(self.head_densities)

    def with_density(self, density: float) -> Pooled:
        return replace(self, density=density, head_densities=())

    def of_layer(self, layer: int) -> Pooled:
        densities = density_of_layer(self.head_densities, layer)
        return self if densities is self.head_densities else replace(self, head_densities=densities)

    def select(
        self,
        blocks: SequenceBlocks,
        _tables: None,
        call: AttentionCall,
        _memory: LayerMemory | None = None,
    ) -> BlockMask:
        """Mask of one call from its queries and keys."""
        scores = pooled_scores_of(blocks, call, call.scale)
        return self._keep(blocks, scores, call.key_mask, call.hidden_blocks, call.backend("selection"), call.heads)

    def scores(self, blocks: SequenceBlocks, _tables: None, call: AttentionCall) -> torch.Tensor:
        """Softmax of the pooled scores of what is seen."""
        scores = pooled_scores_of(blocks, call, call.scale)
        if call.hidden_blocks is not None:
            scores = scores.masked_fill(call.hidden_blocks, torch.finfo(scores.dtype).min)
        return scores.softmax(-1)

    def chosen_by(
        self, blocks: SequenceBlocks, scores: torch.Tensor, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What one call with this softmax would keep."""
        return self._keep(blocks, scores.clamp_min(1e-38).log(), hidden=hidden).to_dense()

    def _keep(
        self,
        blocks: SequenceBlocks,
        scores: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        backend: str = "auto",
        heads: HeadShard | None = None,
    ) -> BlockMask:
        return keep_best(
            blocks,
            scores,
            key_mask,
            density=shares_per_head(self.head_densities, self.density, scores.shape[1], scores.device, heads),
            top_p=self.top_p,
            forced_k=blocks.first_frame_k if self.sink_first_frame else None,
            keep_own=self.keep_own,
            hidden=hidden,
            backend=backend,
        )
