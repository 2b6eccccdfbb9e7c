"""Pyramid sparse attention: far blocks are read as averages of 2, 4 or 8 neighbouring keys (PSA, ziplab).

A key block at level L is replaced by the means of its runs of L consecutive tokens, keys and values alike,
and each mean's logit gets ``+ ln L`` because it stands for L tokens; all levels share one softmax. Level 1 is
exact, level 0 is not read. Runs that are cut short, by the end of the sequence or by hidden keys, are means
of what is there and get the logarithm of that count, so that the total weight stays that of the tokens.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .selection import Impl, gather_mask, gather_rows, tile_obstacle, use_triton

LEVELS = (1, 2, 4, 8)
CHUNK_LOGITS = 1 << 24
"""The torch version holds about this many logits at a time."""


def quota_levels(importance: torch.Tensor, cumulative: tuple[float, float, float, float]) -> torch.Tensor:
    """Levels by fixed shares: the best ``cumulative[0]`` of a row's blocks get level 1, up to [1] level 2...

    Args:
        importance: ``[B, H, nq, nk]``, larger is better; ties go to the lower index.
        cumulative: non-decreasing shares of nk up to which levels 1, 2, 4 and 8 reach; PSA for Wan2.1-1.3B:
            (.05, .1, .15, .25). Counts are rounded up, and at least one block has level 1.

    Returns:
        int8 ``[B, H, nq, nk]`` of 0, 1, 2, 4, 8.
    """
    check_cumulative(cumulative)
    nk = importance.shape[-1]
    rank = importance.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    ends = [max(1, -(-round(share * 1_000_000) * nk // 1_000_000)) for share in cumulative]
    return levels_from_rank(rank, [rank < end for end in ends])


def energy_levels(
    importance: torch.Tensor, cumulative: tuple[float, float, float, float], min_full: float = 0.06
) -> torch.Tensor:
    """Levels by energy: blocks up to ``cumulative[0]`` of a row's total importance get level 1, and so on.

    Args:
        importance: ``[B, H, nq, nk]``, not negative. The block that crosses a bound has the finer level.
        cumulative: non-decreasing; PSA for Wan2.1-14B: (.4, .5, .6, .8).
        min_full: share of the blocks that have level 1 in any case.

    Returns:
        int8 ``[B, H, nq, nk]`` of 0, 1, 2, 4, 8.
    """
    check_cumulative(cumulative)
    nk = importance.shape[-1]
    value, order = importance.float().sort(dim=-1, descending=True, stable=True)
    before = (value.cumsum(-1) - value) / value.sum(-1, keepdim=True)
    within = [before < share for share in cumulative]
    within[0][..., : max(1, -(-round(min_full * 1_000_000) * nk // 1_000_000))] = True
    # Levels of the sorted blocks, put back where the blocks came from: no second sort.
    levels = levels_from_rank(before, within)
    return torch.empty_like(levels).scatter_(-1, order, levels)


def check_cumulative(cumulative: tuple[float, float, float, float]) -> None:
    """Four non-decreasing shares in [0, 1]."""
    bounds = (0.0, *cumulative, 1.0)
    if len(cumulative) != 4 or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"cumulative must be four non-decreasing shares in [0, 1], got {cumulative}.")


def levels_from_rank(rank: torch.Tensor, within: list[torch.Tensor]) -> torch.Tensor:
    """The finest level whose condition holds, else 0, in the shape of ``rank``."""
    levels = torch.zeros_like(rank, dtype=torch.int8)
    for level, inside in reversed(list(zip(LEVELS, within))):
        levels = torch.where(inside, level, levels)
    return levels.to(torch.int8)


def similarity_cap(
    k: torch.Tensor,
    block: int,
    *,
    rows: torch.Tensor | None = None,
    thresholds: tuple[float, float, float] = (0.7, 0.65, 0.6),
    impl: Impl = "auto",
) -> torch.Tensor:
    """The coarsest level that the keys of a block are similar enough for: int8 ``[B, H, nk]``.

    Level L of 2, 4, 8 needs a mean cosine over the block's runs of L, between a run's first and last token,
    above its threshold, and the levels before it too. Apply it as ``levels.minimum(cap[:, :, None])``.
    """
    if use_triton(impl, k.device, None if block >= LEVELS[-1] and not block & (block - 1) else "no power of two"):
        from .triton_spread import similarity_cap_triton

        return similarity_cap_triton(k, block, rows=rows, thresholds=thresholds)
    k = F.normalize(gather_rows(k, rows).float(), dim=-1)
    k = F.pad(k, (0, 0, 0, -k.shape[2] % block)).unflatten(2, (-1, block))
    cap = torch.ones(k.shape[:3], dtype=torch.int8, device=k.device)
    open_ = torch.ones_like(cap, dtype=torch.bool)
    for level, threshold in zip(LEVELS[1:], thresholds):
        first, last = k[..., ::level, :], k[..., level - 1 :: level, :]
        # Runs that the end of the sequence cuts have cosine 0 with padding; they are left out of the mean.
        whole = (last.square().sum(-1) > 0).sum(-1).clamp(min=1)
        open_ = open_ & ((first * last).sum((-1, -2)) / whole > threshold)
        cap = torch.where(open_, level, cap).to(torch.int8)
    return cap


def pool_level(x: torch.Tensor, visible: torch.Tensor | None, level: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means over runs of ``level`` slots of x ``[B, H, S, D]`` and the number of tokens in each."""
    seq = x.shape[2]
    seen = torch.ones(1, 1, seq, dtype=torch.bool, device=x.device) if visible is None else visible
    x = torch.where(seen[..., None], x, torch.zeros((), dtype=x.dtype, device=x.device))
    pad = -seq % level
    total = F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, level)).sum(3)
    count = F.pad(seen, (0, pad)).unflatten(-1, (-1, level)).sum(-1)
    return total / count.clamp(min=1)[..., None], count


def pyramid_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    levels: torch.Tensor,
    *,
    block_q: int,
    block_k: int,
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention whose query blocks read each key block at a level of their own.

    Differentiable in q, k and v, also through the denominators.

    Args:
        q, k, v: ``[B, Sq, H, D]``, ``[B, Sk, H, D]`` twice, any strides.
        levels: int ``[B|1, H|1, nq, nk]`` of 0 (not read), 1, 2, 4, 8. Text blocks should have level 1.
        block_q, block_k: tokens in a query and in a key block; ``block_k`` a multiple of 8.
        rows, key_mask: see :func:`dit_accel.kernels.selection.pool_blocks`; output in original order.
        scale: softmax scale, ``D ** -0.5`` when left out.
        return_lse: also return the natural log of the denominators, float32 ``[B, H, Sq]``.

    Returns:
        ``[B, Sq, H, D]`` in q's dtype; a query that reads nothing gives 0 (and -inf).
    """
    nq, nk = -(-q.shape[1] // block_q), -(-k.shape[1] // block_k)
    if block_k % LEVELS[-1]:
        raise ValueError(f"block_k must be a multiple of {LEVELS[-1]}, got {block_k}.")
    if levels.dim() != 4 or tuple(levels.shape[2:]) != (nq, nk):
        raise ValueError(f"levels must be [B, H, {nq}, {nk}] for this geometry, got {tuple(levels.shape)}.")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    obstacle = tile_obstacle(q, block_q, block_k)
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if recorded and impl == "auto":
        obstacle = "The kernels of its gradients have passed interpreted, not yet compiled on a GPU."
    if use_triton(impl, q.device, obstacle):
        if recorded:
            from .triton_pyramid_backward import PyramidAttention

            out, lse = PyramidAttention.apply(q, k, v, levels, block_q, block_k, rows, key_mask, scale)
        else:
            from .triton_pyramid import pyramid_attention_triton

            out, lse = pyramid_attention_triton(q, k, v, levels, block_q, block_k, rows, key_mask, scale)
    else:
        out, lse = _pyramid_attention_torch(q, k, v, levels, block_q, block_k, rows, key_mask, scale)
    return (out, lse) if return_lse else out


def _pyramid_attention_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    levels: torch.Tensor,
    block_q: int,
    block_k: int,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, q_len, heads, _ = q.shape
    visible = None if key_mask is None else gather_mask(key_mask, rows)
    q_slots = gather_rows(q, rows).to(wide) * scale
    k_slots, v_slots = gather_rows(k, rows).to(wide), gather_rows(v, rows).to(wide)
    keys, values, bias, level_of, block_of = [], [], [], [], []
    for level in LEVELS:
        k_mean, count = pool_level(k_slots, visible, level)
        keys.append(k_mean)
        values.append(pool_level(v_slots, visible, level)[0])
        bias.append(count.to(wide).log().expand(batch, -1, -1))
        runs = torch.arange(k_mean.shape[2], device=q.device)
        block_of.append(runs * level // block_k)
        level_of.append(torch.full_like(runs, level))
    k_all, v_all = torch.cat(keys, 2).transpose(-1, -2), torch.cat(values, 2)
    bias_all = torch.cat(bias, 2)[:, :, None]
    block_all, level_all = torch.cat(block_of), torch.cat(level_of)
    step = max(1, CHUNK_LOGITS // (batch * heads * block_q * k_all.shape[-1])) * block_q
    outs, lses = [], []

    def attend(
        q_part: torch.Tensor, k_all: torch.Tensor, v_all: torch.Tensor, bias_all: torch.Tensor, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        row_block = torch.arange(start, start + q_part.shape[2], device=q.device) // block_q
        read = levels[:, :, row_block][..., block_all] == level_all
        logits = torch.where(read, q_part @ k_all + bias_all, -torch.inf)
        lse = logits.logsumexp(-1)
        prob = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
        return prob @ v_all, lse

    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    for start in range(0, q_len, step):
        inputs = (q_slots[:, :, start : min(start + step, q_len)], k_all, v_all, bias_all, start)
        # Without recomputation autograd would keep the logits of all chunks.
        out, lse = checkpoint(attend, *inputs, use_reentrant=False) if recorded else attend(*inputs)
        outs.append(out)
        lses.append(lse)
    out, lse = torch.cat(outs, 2), torch.cat(lses, 2)
    if rows is not None:
        index = rows.long().expand(batch, heads, q_len)
        out = torch.zeros_like(out).scatter(2, index[..., None].expand_as(out), out)
        lse = torch.zeros_like(lse).scatter(2, index, lse)
    return out.transpose(1, 2).to(q.dtype), lse if wide == torch.float64 else lse.float()
