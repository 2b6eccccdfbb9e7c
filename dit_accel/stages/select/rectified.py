"""Selection of Rectified SpaAttn: pooled scores whose text columns are not pooled (arXiv 2511.19835)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ...call import AttentionCall
from ...kernels import BlockMask
from ...kernels.common.tokens import gather_mask, gather_rows
from ...kernels.selection.api import pool_blocks
from ...kernels.selection.pairs import pooled_scores_under
from ...plan import LayerMemory, SequenceBlocks
from .pooled import candidates, keep_chosen
from .protocol import Select, check_block, check_share


@dataclass(frozen=True)
class Reallocated(Select):
    """Keep key blocks by their share of the attention, where a mean key counts for all tokens of its block.

    A softmax over mean keys and single text keys would give a block of b tokens the weight of one: the
    weights of blocks are therefore multiplied by their tokens before they are normalised together with the
    text ("isolated-pooling attention reallocation"). Of a row the largest shares are kept while they sum up
    to at most ``top_p``, and one more, but no fewer than ``density`` of the blocks.

    Attributes:
        density: least kept share of the latent key blocks, in (0, 1].
        top_p: attention to keep, text not counted, in (0, 1].
        neighbours: also read this many key blocks before and after the query block, in the order's sequence.
        sink_first_frame: always read the blocks of the first latent frame.
        block: tokens in a query and in a key block.
    """

    density: float = 0.25
    top_p: float = 0.3
    neighbours: int = 1
    sink_first_frame: bool = True
    block: tuple[int, int] = (128, 128)
    has_density: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("density", self.density)
        check_share("top_p", self.top_p)
        if self.neighbours < 0:
            raise ValueError(f"select.neighbours must be at least 0 blocks, got {self.neighbours}.")
        check_block(self.block)

    def with_density(self, density: float) -> Reallocated:
        return replace(self, density=density)

    def prepare(self, blocks: SequenceBlocks) -> torch.Tensor:
        """bool ``[B|1, H|1, nq, nk]``: blocks kept for where they lie."""
        first_q = torch.arange(blocks.num_blocks[0], device=blocks.device)[:, None] * blocks.block_q
        first_k = torch.arange(blocks.num_blocks[1], device=blocks.device) * blocks.block_k
        reach = self.neighbours * blocks.block_k
        near = (first_k < first_q + blocks.block_q + reach) & (first_k + blocks.block_k > first_q - reach)
        if self.sink_first_frame:
            return near | blocks.first_frame_k[..., None, :]
        return near[None, None]

    def select(
        self,
        blocks: SequenceBlocks,
        tables: torch.Tensor,
        call: AttentionCall,
        memory: LayerMemory | None = None,
    ) -> BlockMask:
        """Mask of one call from its queries and keys."""
        found = pooled_shares(blocks, call)
        if memory is not None:
            memory.found = found
        open_k = candidates(blocks, call.key_mask)[..., None, :]
        if call.seen is not None:
            open_k = open_k & call.seen.visible
        ranked, order = found.blocks.masked_fill(~open_k, -1.0).sort(dim=-1, descending=True, stable=True)
        kept = ranked.clamp_min(0.0).cumsum(-1, dtype=torch.float64) <= self.top_p
        # ... and one more: the block that crosses the bound.
        kept = torch.cat([torch.ones_like(kept[..., :1]), kept[..., :-1]], -1)
        least = torch.ceil(open_k.sum(-1, keepdim=True) * self.density - 1e-6)
        kept = (kept | (torch.arange(kept.shape[-1], device=kept.device) < least)) & (ranked >= 0)
        chosen = torch.zeros_like(kept).scatter_(-1, order, kept)
        return keep_chosen(blocks, chosen | tables, call.key_mask, call.backend("selection"))


@dataclass(frozen=True, eq=False)
class PooledShares:
    """Share of the attention of every latent key block, and of all text together; a row adds up to 1.

    Attributes:
        blocks: float32 ``[B, H, nq, nk]``, 0 for blocks that are empty or hold text.
        text: float32 ``[B, H, nq]``.
        q_mean, k_mean: means of the blocks' tokens, float32 ``[B, H, n, D]``.
    """

    blocks: torch.Tensor
    text: torch.Tensor
    q_mean: torch.Tensor
    k_mean: torch.Tensor


def pooled_shares(blocks: SequenceBlocks, call: AttentionCall) -> PooledShares:
    """Shares from a call's queries and keys; the mean query of a block stands for its queries.

    The tokens of a block that holds latents and text count as text, each for itself.
    """
    q, k, key_mask = call.q, call.k, call.key_mask
    rows, slots, backend = blocks.kernel_rows, blocks.extra_slots, call.backend("selection")
    q_mean = pool_blocks(q, blocks.block_q, rows=rows, backend=backend)
    k_mean = pool_blocks(k, blocks.block_k, rows=rows, key_mask=key_mask, backend=backend)
    queries = q_mean * call.scale
    logits = queries @ k_mean.transpose(-1, -2)
    if call.seen is not None:
        logits = pooled_scores_under(logits, q, k, call.seen, rows=rows, scale=call.scale)
    if slots is None and key_mask is None and call.seen is None:
        share = (logits + blocks.tokens_k.log()).softmax(-1)
        return PooledShares(share, torch.zeros_like(share[..., 0]), q_mean, k_mean)
    seq_len = blocks.layout.seq_len
    visible = torch.ones(1, seq_len, dtype=torch.bool, device=q.device) if key_mask is None else key_mask
    seen = gather_mask(visible, rows)
    tokens = torch.nn.functional.pad(seen, (0, -seq_len % blocks.block_k)).unflatten(-1, (-1, blocks.block_k))
    count = tokens.sum(-1).clamp_min(1)[..., None, :].float()
    open_k = candidates(blocks, key_mask)[..., None, :]
    if call.seen is not None:
        open_k = open_k & call.seen.visible
    logits = (logits + count.log()).masked_fill(~open_k, -torch.inf)
    text = torch.full_like(logits[..., :1], -torch.inf)
    if slots is not None:
        keys = k[:, slots].transpose(1, 2) if rows is None else gather_rows(k, rows[..., slots])
        hidden = ~seen[..., slots]
        # where, not a product: a padded prompt may hold NaN.
        single = queries @ keys.float().masked_fill(hidden[..., None], 0.0).transpose(-1, -2)
        text = single.masked_fill(hidden[..., None, :], -torch.inf).logsumexp(-1, keepdim=True)
    norm = torch.cat([logits, text], -1).logsumexp(-1, keepdim=True)
    norm = norm.masked_fill(norm == -torch.inf, torch.inf)
    return PooledShares(torch.exp(logits - norm), torch.exp(text - norm)[..., 0], q_mean, k_mean)
