"""Tokens and key masks in the order of a permutation, and which blocks a key mask hides."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gather_rows(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """(B, S, H, D) tokens as (B, H, n, D), slot ``i`` holding original row ``rows[b, h, i]``; all rows if None."""
    if rows is None:
        return x.transpose(1, 2)
    batch, length, heads, dim = x.shape
    head = torch.arange(heads, device=x.device)[:, None]
    lead = torch.arange(batch, device=x.device)[:, None, None] * length
    # One copy of D numbers per index is far faster on a CPU than an element-wise gather.
    flat = ((lead + rows.long()) * heads + head).reshape(-1)
    return x.reshape(-1, dim).index_select(0, flat).view(batch, heads, -1, dim)


def gather_mask(key_mask: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """bool [B, S] in original order as [B, H|1, S] in slot order."""
    mask = key_mask[:, None]
    return mask if rows is None else torch.take_along_dim(mask, rows.long(), dim=2)


def hidden_blocks(
    key_mask: torch.Tensor, block: int, *, rows: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which key blocks a key mask hides completely, and which in part.

    Args:
        key_mask: bool ``[B, S]`` in original token order, True = visible.
        block: tokens in a block.
        rows: optional int ``[B|1, H|1, S]`` permutation, slot ``n`` reads original row ``rows[b, h, n]``.

    Returns:
        ``(empty, partial)``, bool ``[B, H|1, n]``; a block is partial when it has hidden and visible tokens.
    """
    mask = gather_mask(key_mask, rows)
    pad = -mask.shape[-1] % block
    visible = F.pad(mask, (0, pad), value=False).unflatten(-1, (-1, block))
    hidden = F.pad(~mask, (0, pad), value=False).unflatten(-1, (-1, block)).any(-1)
    seen = visible.any(-1)
    return ~seen, seen & hidden
