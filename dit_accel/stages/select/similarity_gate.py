"""Pooled selection that trusts the mean of a block only where its tokens resemble each other (SpargeAttn)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ...call import AttentionCall
from ...kernels import BlockMask
from ...kernels.selection.pairs import pooled_scores_under
from ...plan import LayerMemory, SequenceBlocks
from .means import key_means, key_similarity, mean_key, query_means, query_similarity
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
    of_call_alone: ClassVar[bool] = True
    goes_round: ClassVar[bool] = True

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
        backend = call.backend("selection")
        q_mean, k_mean = query_means(blocks, call), key_means(blocks, call)
        centre = mean_key(call) if self.smooth_k else None
        if centre is not None:
            k_mean = k_mean - centre[:, :, None]
        forced_q = forced_k = None
        if self.similarity > -1.0:
            forced_q = query_similarity(blocks, call) <= self.similarity
            forced_k = key_similarity(blocks, call, centre) <= self.similarity
        if self.sink_first_frame:
            first = blocks.first_frame_k
            forced_k = first if forced_k is None else forced_k | first
        scores = (q_mean * call.scale) @ k_mean.transpose(-1, -2)
        if call.seen is not None:
            keys = call.k if centre is None else call.k - centre[:, None].to(call.k.dtype)
            scores = pooled_scores_under(scores, call.q, keys, call.seen, rows=blocks.kernel_rows, scale=call.scale)
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
