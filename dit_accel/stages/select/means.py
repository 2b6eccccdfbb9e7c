"""Means of the blocks of a call, also where several processes share its tokens: means are gathered, tokens never."""

from __future__ import annotations

import torch

from ...call import AttentionCall
from ...kernels.selection.api import pool_blocks, self_similarity
from ...plan import SequenceBlocks


def query_means(blocks: SequenceBlocks, call: AttentionCall) -> torch.Tensor:
    """Mean query of every block of the sequence, float32 ``[B, H, nq, D]``."""
    backend, part = call.backend("selection"), call.part
    if part is None:
        return pool_blocks(call.q, blocks.block_q, rows=blocks.kernel_rows, backend=backend)
    return part.ring.gather(pool_blocks(call.q, blocks.block_q, backend=backend), 2, part.q_counts)


def key_means(blocks: SequenceBlocks, call: AttentionCall) -> torch.Tensor:
    """Mean visible key of every block of the sequence, float32 ``[B, H, nk, D]``."""
    return _of_key_blocks(call.k, blocks, call)


def value_means(blocks: SequenceBlocks, call: AttentionCall) -> torch.Tensor:
    """Mean value of the visible keys of every block of the sequence, float32 ``[B, H, nk, D]``."""
    return _of_key_blocks(call.v, blocks, call)


def _of_key_blocks(x: torch.Tensor, blocks: SequenceBlocks, call: AttentionCall) -> torch.Tensor:
    backend, part = call.backend("selection"), call.part
    if part is None:
        return pool_blocks(x, blocks.block_k, rows=blocks.kernel_rows, key_mask=call.key_mask, backend=backend)
    return of_all_keys(pool_blocks(x, blocks.block_k, key_mask=own_key_mask(call), backend=backend), call)


def query_similarity(blocks: SequenceBlocks, call: AttentionCall) -> torch.Tensor:
    """Mean cosine of the queries of every block, float32 ``[B, H, nq]``."""
    backend, part = call.backend("selection"), call.part
    if part is None:
        return self_similarity(call.q, blocks.block_q, rows=blocks.kernel_rows, backend=backend)
    return part.ring.gather(self_similarity(call.q, blocks.block_q, backend=backend), 2, part.q_counts)


def key_similarity(blocks: SequenceBlocks, call: AttentionCall, centre: torch.Tensor | None) -> torch.Tensor:
    """Mean cosine of the visible keys of every block, less ``centre [B, H, D]``, float32 ``[B, H, nk]``."""
    backend, part = call.backend("selection"), call.part
    if part is None:
        rows, key_mask = blocks.kernel_rows, call.key_mask
        return self_similarity(call.k, blocks.block_k, rows=rows, key_mask=key_mask, centre=centre, backend=backend)
    own = self_similarity(call.k, blocks.block_k, key_mask=own_key_mask(call), centre=centre, backend=backend)
    return of_all_keys(own, call)


def mean_key(call: AttentionCall) -> torch.Tensor:
    """Mean visible key of the sequence, float32 ``[B, H, D]``."""
    part, k, key_mask = call.part, call.k, own_key_mask(call)
    if part is None and key_mask is None:
        return k.mean(1, dtype=torch.float32)
    if key_mask is None:
        total = k.sum(1, dtype=torch.float32)
        number = torch.full((), float(call.k.shape[1]), device=k.device).expand_as(total[..., :1])
    else:
        visible = key_mask[:, :, None, None]
        # where, not a product: a padded prompt may hold NaN.
        total = torch.where(visible, k, 0).sum(1, dtype=torch.float32)
        number = visible.sum(1).float().expand_as(total[..., :1])
    if part is not None:
        sums = part.ring.gather(torch.cat([total, number], -1)[None], 0, [1] * part.ring.size).sum(0)
        total, number = sums[..., :-1], sums[..., -1:]
    return total / number.clamp_min(1)


def of_all_keys(own: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """``[B, H, n, ...]`` of the key blocks that this process has to ``[B, H, nk, ...]`` of all."""
    return own if call.part is None else call.part.ring.gather(own, 2, call.part.k_counts)


def own_key_mask(call: AttentionCall) -> torch.Tensor | None:
    """Which of the keys that this process has are visible."""
    part = call.part
    return call.key_mask if part is None else part.key_mask_of(part.ring.rank, call.key_mask)
