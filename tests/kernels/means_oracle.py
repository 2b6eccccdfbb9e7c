"""Attention to kept blocks and, in the same softmax, to the means of all others: inputs, and numbers by definition."""

from __future__ import annotations

import torch

from dit_accel.kernels import BlockMask
from dit_accel.kernels.attention.means import BlockMeans, LeftOutMeans
from dit_accel.kernels.mask.packed import pack_bits

from .oracle import permute, unpermute, visible_tokens


def means_of(k: torch.Tensor, v: torch.Tensor, mask: BlockMask, rows: torch.Tensor | None, tokens: int) -> LeftOutMeans:
    """Means of runs of ``tokens`` slots, rounded to the dtype of ``k`` and ``v [B, S, H, D]``."""

    def pooled(x: torch.Tensor) -> torch.Tensor:
        slots = permute(x.transpose(1, 2).double(), rows)
        return torch.stack([run.mean(2) for run in slots.split(tokens, 2)], 2).to(x.dtype)

    bits = pack_bits(mask.to_dense())
    return LeftOutMeans(BlockMeans(pooled(k), pooled(v), tokens, mask.block_k, mask.kv_len), bits, "triton")


def attention_over_means(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    rows: torch.Tensor | None,
    given: LeftOutMeans,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax over the kept blocks' tokens and, of every other block, its means, of n tokens with ``ln n`` more;
    from the means as they are given. Output ``[B, Sq, H, D]`` and log-sum-exp."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    means = given.means
    qh, kh, vh = (permute(x.transpose(1, 2).to(dtype), rows) for x in (q, k, v))
    of_keys = (qh @ kh.transpose(2, 3) * scale).masked_fill(~visible_tokens(mask, None, rows).to(q.device), -torch.inf)
    sizes = [min(means.tokens, mask.kv_len - first) for first in range(0, mask.kv_len, means.tokens)]
    of_means = qh @ means.keys.to(dtype).transpose(2, 3) * scale + torch.tensor(sizes, device=q.device).to(dtype).log()
    reads = mask.to_dense().to(q.device)
    for query in range(reads.shape[2]):
        for block in range(reads.shape[3]):
            first = block * (means.block_k // means.tokens)
            run = slice(first, min(first + means.block_k // means.tokens, len(sizes)))
            part = of_means[:, :, query * mask.block_q : (query + 1) * mask.block_q, run]
            part.masked_fill_(reads[:, :, query, block, None, None], -torch.inf)
    scores = torch.cat([of_keys, of_means], 3)
    out = scores.softmax(3) @ torch.cat([vh, means.values.to(dtype)], 2)
    return unpermute(out, rows).transpose(1, 2), unpermute(scores.logsumexp(3)[..., None], rows)[..., 0]
