"""Keys sorted by the attention that they get, inside segments of the grid; queries stay in tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...call import AttentionCall
from ...layout import TokenLayout
from .protocol import Order
from .simple import fold_tile, tile_order, whole_sequence

LOGITS_AT_ONCE = 1 << 26


@dataclass(frozen=True, eq=False)
class Segments:
    """What a layout's segments are.

    Attributes:
        rows: int32 ``[S]``, the order of the queries: latents tile by tile, then all other tokens.
        number: int64 ``[num_latent]``, the segment of each latent by raster index.
    """

    rows: torch.Tensor
    number: torch.Tensor


@dataclass(frozen=True)
class SortedSegments(Order):
    """Keys of a segment by falling attention, so that its important ones share blocks (PBS-Attn).

    Permuted block-sparse attention (arXiv 2510.21270) sorts the keys of each segment by their mean
    probability under the last query block of a prompt. A latent grid has no last block: here a sample of
    queries, evenly spread over the latents, stands for all. Queries stay in tiles of the grid: a block of them,
    sorted too, would hold queries from anywhere in a segment.

    Keys are sorted by a copy of keys and values, which puts each in the place of another that is seen as it is: so
    kernels need one order, and a mask of keys holds. Under a mask of token pairs no key moves.

    Attributes:
        segment: latent tokens of a segment (frames, height, width); an image folds it as tiles.
        samples: queries whose attention is averaged.
        tile: tokens of the tiles of queries.
    """

    segment: tuple[int, int, int] = (4, 8, 8)
    samples: int = 128
    tile: tuple[int, int, int] = (4, 4, 4)

    spans_references: ClassVar[bool] = False
    follows_call: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if len(self.segment) != 3 or min(self.segment) < 1:
            raise ValueError(f"order.segment must be three sizes of at least 1, got {self.segment}.")
        if len(self.tile) != 3 or min(self.tile) < 1:
            raise ValueError(f"order.tile must be three sizes of at least 1, got {self.tile}.")
        if self.samples < 1:
            raise ValueError(f"order.samples must be at least 1 query, got {self.samples}.")

    def rows(self, layout: TokenLayout, device: torch.device, _layer: int = 0) -> torch.Tensor:
        return self.prepare(layout, device).rows

    def rows_of_call(self, layout: TokenLayout, call: AttentionCall, tables: Segments | None = None) -> torch.Tensor:
        """int32 ``[S]``: that of the layout, whatever the call."""
        return (tables or self.prepare(layout, call.q.device)).rows

    def keys_of_call(
        self, layout: TokenLayout, call: AttentionCall, tables: Segments | None = None
    ) -> torch.Tensor | None:
        """int32 ``[B, H, S]``: the token whose key and value take each token's place."""
        if call.pairs is not None:
            return None
        segments = tables or self.prepare(layout, call.q.device)
        first, last, device = layout.latent_start, layout.latent_start + layout.num_latent, call.q.device
        score = sampled_attention(layout, call, self.samples).nan_to_num(0.0)
        # A probability is at most 1, so that segments stay in their order.
        best = (segments.number - score[..., first:last].double() / 2).argsort(dim=-1, stable=True) + first
        place = segments.rows[: layout.num_latent].long().expand_as(best)
        if call.key_mask is not None:
            # Hidden keys stay: theirs are places behind the sequence.
            best, place = (_visible_first(x, call.key_mask, layout.seq_len) for x in (best, place))
        found = torch.arange(layout.seq_len + 1, device=device).expand(*score.shape[:2], -1)
        return found.scatter(2, place, best)[..., :-1].to(torch.int32)

    def prepare(self, layout: TokenLayout, device: torch.device) -> Segments:
        """The segments of a layout, worked out once."""
        segment, tile = (fold_tile(shape, layout.grid[0]) for shape in (self.segment, self.tile))
        rows = whole_sequence(layout.without_references(), lambda grid: tile_order(grid, tile, device))
        return Segments(rows, tile_numbers(layout.grid, segment, device))


def _visible_first(tokens: torch.Tensor, key_mask: torch.Tensor, behind: int) -> torch.Tensor:
    """int64 ``[B, H, n]``: the ``tokens`` that are seen, in their order, then ``behind`` for each other one."""
    hidden = ~key_mask[:, None].expand(-1, tokens.shape[1], -1).gather(2, tokens)
    order = hidden.to(torch.uint8).argsort(dim=-1, stable=True)
    return tokens.masked_fill(hidden, behind).gather(2, order)


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


def tile_numbers(grid: tuple[int, int, int], tile: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """int64 ``[F * H * W]``: the tile of each latent, by raster index."""
    f, h, w = (torch.arange(side, device=device) // size for side, size in zip(grid, tile, strict=True))
    tiles_h, tiles_w = -(-grid[1] // tile[1]), -(-grid[2] // tile[2])
    return ((f[:, None, None] * tiles_h + h[None, :, None]) * tiles_w + w[None, None, :]).flatten()
