"""An order that depends on the call: keys sorted by the attention they get, inside segments of the grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...call import AttentionCall
from ...layout import TokenLayout
from .protocol import Order
from .simple import fold_tile, tile_order

LOGITS_AT_ONCE = 1 << 26


@dataclass(frozen=True, eq=False)
class Segments:
    """Which tokens a layout's segments hold.

    Attributes:
        tokens: int64 ``[n, width]``, a segment's latent tokens, filled up with the length of the sequence.
        slots: int64, places in the flattened ``tokens`` that hold a token, or None where all do.
        others: int64, all other tokens than latents.
    """

    tokens: torch.Tensor
    slots: torch.Tensor | None
    others: torch.Tensor


@dataclass(frozen=True)
class SortedSegments(Order):
    """Tokens of a segment by falling attention, so that its important keys share blocks (PBS-Attn).

    Permuted block-sparse attention (arXiv 2510.21270) sorts the keys of each segment by their mean
    probability under the last query block of a prompt. A latent grid has no last block: here a sample of
    queries, evenly spread over the latents, stands for all. Queries follow the order of the keys.

    Attributes:
        segment: latent tokens of a segment (frames, height, width); an image folds it as tiles.
        samples: queries whose attention is averaged.
    """

    segment: tuple[int, int, int] = (4, 16, 16)
    samples: int = 128

    spans_references: ClassVar[bool] = False
    follows_call: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if len(self.segment) != 3 or min(self.segment) < 1:
            raise ValueError(f"order.segment must be three sizes of at least 1, got {self.segment}.")
        if self.samples < 1:
            raise ValueError(f"order.samples must be at least 1 query, got {self.samples}.")

    def rows(self, _layout: TokenLayout, _device: torch.device, _layer: int = 0) -> torch.Tensor | None:
        raise TypeError("SortedSegments orders the tokens of a call; use rows_of_call.")

    def rows_of_call(self, layout: TokenLayout, call: AttentionCall, tables: Segments | None = None) -> torch.Tensor:
        """int32 ``[B, H, S]``: the token at each slot, from a call's queries and keys.

        ``tables`` are the segments of the layout, where they are at hand.
        """
        segments = tables or self.prepare(layout, call.q.device)
        score = sampled_attention(layout, call, self.samples)
        # What fills a segment up comes last in it: a probability is never below 0.
        filled = torch.nn.functional.pad(score, (0, 1), value=-1.0)[:, :, segments.tokens]
        order = filled.argsort(dim=-1, descending=True, stable=True)
        latents = segments.tokens.expand_as(order).gather(-1, order).flatten(2)
        if segments.slots is not None:
            latents = latents[..., segments.slots]
        others = segments.others.expand(*score.shape[:2], -1)
        return torch.cat([latents, others], -1).to(torch.int32)

    def prepare(self, layout: TokenLayout, device: torch.device) -> Segments:
        """The segments of a layout, worked out once."""
        tile = fold_tile(self.segment, layout.grid[0])
        base = tile_order(layout.grid, tile, device)
        number = _tile_numbers(layout.grid, tile, device)[base]
        count = number.bincount()
        place = torch.arange(len(base), device=device) - (count.cumsum(0) - count)[number]
        tokens = torch.full((len(count), int(count.max())), layout.seq_len, device=device)
        tokens[number, place] = layout.latent_start + base
        slots = None if tokens.numel() == len(base) else number * tokens.shape[1] + place
        before = torch.arange(layout.latent_start, device=device)
        after = torch.arange(layout.latent_start + layout.num_latent, layout.seq_len, device=device)
        return Segments(tokens, slots, torch.cat([before, after]))


def sampled_attention(layout: TokenLayout, call: AttentionCall, samples: int) -> torch.Tensor:
    """Mean probability of every key under a sample of latent queries, float32 ``[B, H, S]``."""
    q, k, key_mask = call.q, call.k, call.key_mask
    count = min(samples, layout.num_latent)
    # Evenly spread: the middles of ``count`` equal stretches.
    picked = layout.latent_start + ((2 * torch.arange(count, device=q.device) + 1) * layout.num_latent // (2 * count))
    keys = k.permute(0, 2, 3, 1)
    hidden = None if key_mask is None else ~key_mask[:, None, None]
    total = torch.zeros(q.shape[0], q.shape[2], q.shape[1], device=q.device)
    at_once = max(1, LOGITS_AT_ONCE // (q.shape[0] * q.shape[2] * q.shape[1]))
    for part in picked.split(at_once):
        logits = (q[:, part].transpose(1, 2) * call.scale) @ keys
        if hidden is not None:
            logits = logits.masked_fill(hidden, -torch.inf)
        total += logits.softmax(-1, dtype=torch.float32).sum(2)
    return total / count


def _tile_numbers(grid: tuple[int, int, int], tile: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """int64 ``[F * H * W]``: the tile of each latent, by raster index."""
    f, h, w = (torch.arange(side, device=device) // size for side, size in zip(grid, tile, strict=True))
    tiles_h, tiles_w = -(-grid[1] // tile[1]), -(-grid[2] // tile[2])
    return ((f[:, None, None] * tiles_h + h[None, :, None]) * tiles_w + w[None, None, :]).flatten()
