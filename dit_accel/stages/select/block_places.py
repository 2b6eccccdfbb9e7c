"""Static patterns of whole blocks, by where blocks lie on the grid: those nearest, and those of the same cell."""

from __future__ import annotations

import torch

from ...plan import SequenceBlocks
from .token_tables import of_each_order

DIMENSIONS = "fhw"
# What dimensions that do not count weigh in a distance: they only choose among blocks as near in those that do.
UNCOUNTED = 1e-3


def nearest_blocks(blocks: SequenceBlocks, share: float, counted: str) -> torch.Tensor:
    """bool ``[H|1, nq, nk]``: the ``share`` of the key blocks whose middle is nearest to the query block's.

    Distances are shares of the grid in the dimensions that count, so that as many blocks are kept of the same part of
    the grid at every size; a window of tokens would be rounded up to whole blocks, and keep the more the fewer there
    are. Blocks with a token that is not on the grid see and are seen by all.

    Args:
        counted: dimensions, some letters of "fhw"; the others decide among blocks that are as near.
    """
    weights = torch.tensor([1.0 if one in counted else UNCOUNTED for one in DIMENSIONS], dtype=torch.float64)

    def of_order(one: SequenceBlocks) -> torch.Tensor:
        (queries, read_all), (keys, read) = places(one, one.block_q), places(one, one.block_k)
        apart = (queries[:, None] - keys) * weights.to(one.device)
        # Rounded, so that blocks as far apart are so on every device; the first of them is taken.
        distance = apart.square().sum(-1).round(decimals=12).masked_fill(read, torch.inf)
        number = max(1, round(share * int((~read).sum())))
        kept = torch.zeros_like(distance, dtype=torch.bool)
        kept.scatter_(1, distance.argsort(dim=1, stable=True)[:, :number], True)
        return kept | read | read_all[:, None]

    return of_each_order(blocks, of_order)


def blocks_of_cell(blocks: SequenceBlocks, cells: tuple[int, int, int], shifted: bool) -> torch.Tensor:
    """bool ``[H|1, nq, nk]``: key blocks in the query block's cell, of ``cells`` to each dimension of the grid.

    Blocks with a token that is not on the grid see and are seen by all.

    Args:
        shifted: cells begin half a cell later; what is before them is a cell of its own.
    """

    def of_order(one: SequenceBlocks) -> torch.Tensor:
        number = torch.tensor(cells, dtype=torch.float64, device=one.device)
        (queries, read_all), (keys, read) = (
            ((middle * number + 0.5 * shifted * (number > 1)).round(decimals=9).floor(), other)
            for middle, other in (places(one, one.block_q), places(one, one.block_k))
        )
        return (queries[:, None] == keys).all(-1) | read | read_all[:, None]

    return of_each_order(blocks, of_order)


def places(blocks: SequenceBlocks, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The middle of each block's tokens, float64 ``[n, 3]`` in shares of the grid, and bool ``[n]``: whether a block
    has a token that is not on the grid. Padding, which fills a block of some order, is no token here."""
    latent = blocks.latent_of_slot >= 0
    other = ~latent if blocks.filler is None else ~(latent | blocks.filler)
    grid = torch.tensor(blocks.layout.grid, dtype=torch.float64, device=blocks.device)
    tokens = (torch.stack(blocks.coordinates, -1) + 0.5) / grid
    count = -(-blocks.layout.seq_len // size)
    of_slot = torch.arange(blocks.layout.seq_len, device=blocks.device) // size
    here = of_slot[latent]
    total = torch.zeros(count, 3, dtype=torch.float64, device=blocks.device).index_add_(0, here, tokens[latent])
    number = torch.zeros(count, dtype=torch.float64, device=blocks.device)
    number.index_add_(0, here, torch.ones_like(here, dtype=torch.float64))
    return total / number.clamp_min(1.0)[:, None], blocks.any_in_block(other, size)
