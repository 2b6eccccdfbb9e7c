"""Scores and masses of block pairs under a mask of token pairs: a pair of tokens that is hidden does not count.

Blocks seen whole are as without a mask. Those seen in part are few, mostly along the mask's edge: their logits are made
one block pair at a time, and summed over the pairs of tokens that are seen.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..common.tokens import gather_rows
from ..mask.pairs import PairMask
from ..mask.token_bits import unpack_tokens

# Logits of block pairs that are held at a time.
LOGITS_AT_A_TIME = 1 << 24


def pooled_scores_under(
    scores: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    seen: PairMask,
    *,
    rows: torch.Tensor | None = None,
    scale: float,
) -> torch.Tensor:
    """Pooled scores with blocks seen in part scored by the mean logit of the token pairs that are seen.

    Where all are seen, that mean is the product of the block means: the two are one score.

    Args:
        scores: float32 ``[B, H, nq, nk]`` of :func:`~dit_accel.kernels.selection.api.pooled_scores`.
        q, k: ``[B, S, H, D]``.
        seen: of the permuted sequence, with the blocks of ``scores``.
        rows: permutation of queries and keys, see :func:`~dit_accel.kernels.selection.api.pool_blocks`.

    Returns:
        float32 ``[B, H, nq, nk]``; 0 for blocks that are hidden whole: give ``hidden`` to the selection.
    """
    scores = scores.masked_fill(~seen.visible, 0.0)
    for place, logits, bits in _seen_in_part(q, k, seen, rows, scale):
        total = logits.masked_fill(~bits, 0.0).sum((-1, -2))
        scores[place] = (total / bits.sum((-1, -2))).to(scores.dtype)
    return scores


def block_mass_under(
    mass: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    seen: PairMask,
    *,
    rows: torch.Tensor | None = None,
    scale: float,
) -> torch.Tensor:
    """Masses without those of hidden token pairs.

    Args:
        mass: float32 ``[B, H, nq, nk]`` of :func:`~dit_accel.kernels.selection.block_mass.block_mass`, with ``lse``.
        lse: ``[B, H, S]`` over the keys that each query sees, in original order; -inf where it sees none.
        q, k, seen, rows, scale: see :func:`pooled_scores_under`.
    """
    mass = mass.masked_fill(~seen.visible, 0.0)
    if rows is not None:
        lse = torch.take_along_dim(lse, rows.long(), dim=2)
    lse = F.pad(lse, (0, -lse.shape[2] % seen.block_q), value=torch.inf).unflatten(2, (-1, seen.block_q))
    for place, logits, bits in _seen_in_part(q, k, seen, rows, scale):
        # A query that sees no key of the block may see none at all: exp(-inf - -inf) is NaN.
        share = (logits - lse[place[:3]][..., None]).masked_fill(~bits, -torch.inf).exp()
        mass[place] = share.sum((-1, -2)).to(mass.dtype)
    return mass


Place = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _seen_in_part(
    q: torch.Tensor, k: torch.Tensor, seen: PairMask, rows: torch.Tensor | None, scale: float
) -> Iterator[tuple[Place, torch.Tensor, torch.Tensor]]:
    """Of blocks seen in part, some at a time: sample, head, query block and key block ``[n]`` each; logits, float32 or
    float64, and which are seen, bool, ``[n, block_q, block_k]``. Waits for the device."""
    batch, _, heads, _ = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    bit_rows = seen.bit_rows.expand(batch, heads, -1, -1)
    queries, keys = (
        F.pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block))
        for x, block in ((gather_rows(q, rows), seen.block_q), (gather_rows(k, rows), seen.block_k))
    )
    step = max(1, LOGITS_AT_A_TIME // (seen.block_q * seen.block_k))
    for part in (bit_rows >= 0).nonzero().split(step):
        b, h, i, j = part.unbind(1)
        logits = queries[b, h, i].to(wide) @ keys[b, h, j].to(wide).transpose(-1, -2) * scale
        yield (b, h, i, j), logits, unpack_tokens(seen.token_bits[bit_rows[b, h, i, j].long()])
