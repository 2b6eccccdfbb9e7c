"""Where attention mass lies: exact block maps, the density that would keep most of it, recall of a mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..kernels import BlockMask
from ..kernels.common.scale import scale_of


@dataclass(frozen=True, eq=False)
class BlockPattern:
    """The attention of one call, block by block.

    Attributes:
        mass: float32 ``[B, H, nq, nk]``, mean over the queries of a block of the softmax mass that falls into
            a key block; every row sums to 1.
        row_tokens: ``[nq]``, queries in each query block (the last may hold fewer).
        keep: bool ``[B, H, nq, nk]``, the mask's blocks, or None without a mask.
        recall: float32 ``[B, H]``, share of the true mass that the mask lets through, counted token by token;
            None without a mask.
    """

    mass: torch.Tensor
    row_tokens: torch.Tensor
    keep: torch.Tensor | None = None
    recall: torch.Tensor | None = None


def block_pattern(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    block: int = 64,
    rows: torch.Tensor | None = None,
    mask: BlockMask | None = None,
    key_mask: torch.Tensor | None = None,
    pairs: torch.Tensor | None = None,
    scale: float | None = None,
) -> BlockPattern:
    """Exact softmax mass per block, one query block at a time: linear memory in the sequence length.

    Args:
        q: ``[B, S, H, D]`` queries as attention gets them, after norms and rotary embedding.
        k: ``[B, S, Hk, D]`` keys; ``H`` a multiple of ``Hk``.
        block: tokens in query and key blocks; with a mask its sizes count instead.
        rows: int ``[B|1, H|1, S]`` or ``[S]``, the token at each slot of the order that forms the blocks;
            None is the model's order.
        mask: whose recall to measure, on the sequence permuted by ``rows``.
        key_mask: bool ``[B, S]``, False for keys that attention must not see, in the model's order.
        pairs: bool ``[B|1, H|1, S, S]``, which keys (last) each query sees, in place of ``key_mask``.
        scale: of the scores; ``1 / sqrt(D)`` if None.

    Raises:
        ValueError: shapes that do not fit.
    """
    q, k = _head_first(q), _head_first(k)
    if q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q and k must be [B, S, H, D] with matching batch, heads and head size, got (as B, H, S, D) "
            f"{list(q.shape)} and {list(k.shape)}."
        )
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    batch, heads, q_len = q.shape[:3]
    kv_len = k.shape[2]
    if mask is not None and (mask.q_len, mask.kv_len) != (q_len, kv_len):
        raise ValueError(f"the mask is for {mask.q_len} queries and {mask.kv_len} keys, got {q_len} and {kv_len}.")
    block_q, block_k = (block, block) if mask is None else (mask.block_q, mask.block_k)
    visible = None if key_mask is None else key_mask[:, None].expand(batch, heads, kv_len)
    order = None
    if rows is not None:
        if q_len != kv_len:
            raise ValueError(f"rows permute self-attention only, got {q_len} queries and {kv_len} keys.")
        order = rows.long().expand(batch, heads, q_len)
        q = q.gather(2, order[..., None].expand_as(q))
        k = k.gather(2, order[..., None].expand_as(k))
        visible = None if visible is None else visible.gather(2, order)

    scale = scale_of(q, scale)
    masses, kept = [], q.new_zeros(batch, heads, dtype=torch.float64)
    for i, start in enumerate(range(0, q_len, block_q)):
        scores = (q[:, :, start : start + block_q].float() @ k.float().transpose(-1, -2)) * scale
        if visible is not None:
            scores = scores.masked_fill(~visible[:, :, None], -torch.inf)
        if pairs is not None:
            seen = _of_slots(pairs, order, start, start + scores.shape[2])
            scores = scores.masked_fill(~seen, -torch.inf)
        # A query that sees nothing, as of padding, has no mass.
        share = scores.softmax(dim=-1).nan_to_num(0.0) if pairs is not None else scores.softmax(dim=-1)
        masses.append(_by_block(share, block_k).sum(-1).mean(2))
        if mask is not None:
            seen = _visible_tokens(mask, i)[:, :, : share.shape[2]]
            kept += (_by_block(share, block_k) * seen).sum((2, 3, 4), dtype=torch.float64)
    tokens = [min(block_q, q_len - start) for start in range(0, q_len, block_q)]
    return BlockPattern(
        mass=torch.stack(masses, dim=2),
        row_tokens=torch.tensor(tokens, device=q.device),
        keep=None if mask is None else _full(mask.to_dense(), batch, heads),
        recall=None if mask is None else (kept / q_len).float(),
    )


def keep_for_mass(mass: torch.Tensor, target: float = 0.95) -> torch.Tensor:
    """The fewest key blocks of every query block that hold ``target`` of its mass.

    Args:
        mass: ``[..., nq, nk]`` with rows that sum to 1.
        target: share of the mass, in (0, 1].

    Returns:
        bool ``[..., nq, nk]``; at least one block a row.
    """
    if not 0 < target <= 1:
        raise ValueError(f"target must lie in (0, 1], got {target}.")
    ordered, index = mass.double().sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    # Rounding must not make a row that holds everything need one more block.
    needed = before < target * ordered.sum(-1, keepdim=True) - 1e-9
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, index, needed)


def density_for_mass(mass: torch.Tensor, target: float = 0.95) -> torch.Tensor:
    """Kept share of block pairs with ``target`` of every row's mass, ``[...]`` from ``[..., nq, nk]``."""
    return keep_for_mass(mass, target).float().mean((-1, -2))


def recall_of(mass: torch.Tensor, keep: torch.Tensor, row_tokens: torch.Tensor) -> torch.Tensor:
    """Mass in the kept blocks, rows weighted by their queries: ``[...]`` from two ``[..., nq, nk]``.

    For whole blocks this is :attr:`BlockPattern.recall`; used with the blocks of another step it says what a
    reused plan would keep.
    """
    weights = row_tokens.to(mass) / row_tokens.sum()
    return ((mass * keep).sum(-1) * weights).sum(-1)


def pattern_change(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Share of the mass that lies elsewhere (total variation), mean over rows: 0 the same, 1 disjoint."""
    if before.shape != after.shape:
        raise ValueError(f"patterns must have one shape, got {list(before.shape)} and {list(after.shape)}.")
    return 0.5 * (before - after).abs().sum(-1).mean(-1)


def _head_first(x: torch.Tensor) -> torch.Tensor:
    if x.ndim != 4:
        raise ValueError(f"q and k must be [B, S, H, D], got {list(x.shape)}.")
    return x.detach().transpose(1, 2)


def _of_slots(pairs: torch.Tensor, order: torch.Tensor | None, start: int, stop: int) -> torch.Tensor:
    """bool ``[B|1, H|1, stop - start, S]``: what the queries of some slots of an order ``[B, H, S]`` see."""
    if order is None:
        return pairs[:, :, start:stop]
    pairs = pairs.expand(*order.shape[:2], -1, -1)
    return pairs.take_along_dim(order[:, :, start:stop, None], 2).take_along_dim(order[:, :, None], 3)


def _by_block(share: torch.Tensor, block: int) -> torch.Tensor:
    """``[..., nk, block]`` from ``[..., S]``, zeros behind the last token."""
    return F.pad(share, (0, -share.shape[-1] % block)).unflatten(-1, (-1, block))


def _full(keep: torch.Tensor, batch: int, heads: int) -> torch.Tensor:
    return keep.expand(batch, heads, *keep.shape[2:])


def _visible_tokens(mask: BlockMask, row: int) -> torch.Tensor:
    """What the queries of one row of blocks may see: bool ``[B|1, H|1, block_q, nk, block_k]``."""
    one = mask.kv_indices[:, :, row].long()
    lead, nk = one.shape[:2], mask.num_blocks[1]
    slot = torch.arange(one.shape[-1], device=one.device)
    listed = slot < mask.kv_num_blocks[:, :, row, None]
    keep = torch.zeros(*lead, nk + 1, dtype=torch.bool, device=one.device)
    keep = keep.scatter_(-1, torch.where(listed, one, nk), True)[..., :nk]
    seen = keep[:, :, None, :, None].repeat(1, 1, mask.block_q, 1, mask.block_k)
    if mask.kv_bits is not None and mask.token_bits is not None:
        bits = mask.kv_bits[:, :, row]
        partial = listed & (slot >= mask.kv_num_full[:, :, row, None]) & (bits >= 0)
        shift = torch.arange(32, device=one.device, dtype=torch.int32)
        for b, h, s in partial.nonzero().tolist():
            words = mask.token_bits[int(bits[b, h, s])]
            seen[b, h, :, int(one[b, h, s])] = ((words[..., None] >> shift) & 1).bool().flatten(-2)
    return seen
