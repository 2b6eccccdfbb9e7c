"""Key blocks chosen from the queries and keys of the call itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels import BlockMask
from ..kernels.selection import pooled_scores, select_blocks
from ..plan import SequenceBlocks
from .select_static import check_block


@dataclass(frozen=True)
class Pooled:
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
    """

    density: float | None = 0.2
    top_p: float | None = None
    sink_first_frame: bool = False
    block: tuple[int, int] = (128, 64)

    def __post_init__(self) -> None:
        if self.density is None and self.top_p is None:
            raise ValueError("select needs a density, a top_p, or both; got neither.")
        for name in ("density", "top_p"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                raise ValueError(f"select.{name} must lie in (0, 1], got {value}.")
        check_block(self.block)

    @property
    def is_static(self) -> bool:
        return False

    def prepare(self, blocks: SequenceBlocks) -> None:
        """Nothing is worked out ahead of the call."""

    def select(
        self,
        blocks: SequenceBlocks,
        tables: None,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None,
        scale: float | None,
    ) -> BlockMask:
        """Mask of one call from its queries and keys, both (B, S, H, D)."""
        rows = None if blocks.rows is None else blocks.rows[None, None]
        scores = pooled_scores(
            q, k, blocks.block_q, blocks.block_k, rows=rows, key_mask=key_mask, scale=scale
        )
        partial_k, empty_k = (None, None) if key_mask is None else blocks.hidden_k(key_mask)
        forced_k = blocks.forced_k
        if self.sink_first_frame:
            forced_k = blocks.first_frame_k if forced_k is None else forced_k | blocks.first_frame_k
        return select_blocks(
            scores,
            density=self.density,
            top_p=self.top_p,
            forced_q=blocks.forced_q,
            forced_k=forced_k,
            partial_k=partial_k,
            empty_k=empty_k,
            block_q=blocks.block_q,
            block_k=blocks.block_k,
            q_len=blocks.layout.seq_len,
            kv_len=blocks.layout.seq_len,
        )
