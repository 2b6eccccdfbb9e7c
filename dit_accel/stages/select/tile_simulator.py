"""What a neighbourhood window costs in kernel tiles, and which stride and tile shapes make it cheapest.

A kernel computes whole tiles: (query tile, key tile) pairs in which any token pair is visible. How many there
are depends on how window, stride and tile shapes fall on the grid; the analysis follows generalised
neighbourhood attention (GNA, arXiv 2504.16922), whose own simulator was not released.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

import torch

from ...layout import TokenLayout
from ...plan import SequenceBlocks
from ..order.protocol import Order
from ..order.simple import Tiles
from .static import Window

Shape = tuple[int, int, int]
"""Frames, height, width, in latent tokens."""


@dataclass(frozen=True)
class TileCost:
    """Work of one head's attention over a grid.

    Attributes:
        visited: (query tile, key tile) pairs that a kernel computes.
        dense: such pairs of dense attention, which needs no tiles: blocks of as many tokens, tightly packed.
        visible: token pairs inside the windows.
        tokens: of the grid.
    """

    visited: int
    dense: int
    visible: int
    tokens: int

    @property
    def speedup(self) -> float:
        """Upper bound of a kernel's speed-up over dense attention, by tiles."""
        return self.dense / self.visited

    @property
    def ideal_speedup(self) -> float:
        """Upper bound by token pairs: of a kernel that computed nothing but what is visible."""
        return self.tokens**2 / self.visible

    @property
    def efficiency(self) -> float:
        """Share of the ideal speed-up that the tiles leave, in (0, 1]."""
        return self.speedup / self.ideal_speedup


@dataclass(frozen=True)
class TileChoice:
    """A stride, the largest window at its cost, and the tile shapes of queries and keys."""

    window: Shape
    stride: Shape
    tile_q: Shape
    tile_k: Shape
    cost: TileCost


def simulate(
    grid: Shape,
    window: Shape,
    stride: Shape = (1, 1, 1),
    dilation: Shape = (1, 1, 1),
    tile_q: Shape = (4, 4, 8),
    tile_k: Shape = (4, 4, 4),
) -> TileCost:
    """Tiles that a window visits, exactly, on any grid.

    Tiles start at the grid's (with dilation: at every dilation group's) origin and are cut at its far border.

    Args:
        grid: latent frames, height and width.
        window: keys seen per dimension; window times dilation may not exceed the grid.
        stride: queries that share a window, at most the window.
        dilation: distance between the keys of a window; tokens are grouped by it before they are tiled.
        tile_q, tile_k: shapes of a query and a key tile; their products are the kernel's block sizes.

    Raises:
        ValueError: a window, stride, dilation or tile that does not fit.
    """
    shapes = (window, stride, dilation, tile_q, tile_k)
    if any(len(shape) != 3 or min(shape) < 1 for shape in (grid, *shapes)):
        raise ValueError(f"Every shape must be three sizes of at least 1, got {(grid, *shapes)}.")
    for length, size, step, gap in zip(grid, window, stride, dilation, strict=True):
        if size * gap > length or step > size:
            raise ValueError(
                "window x dilation may be at most the grid and stride at most the window in every dimension, "
                f"got grid {grid}, window {window}, dilation {dilation}, stride {stride}."
            )
    visited = prod(_visits(*sizes) for sizes in zip(grid, *shapes, strict=True))
    return _cost(grid, window, visited, prod(tile_q), prod(tile_k))


def choose(
    grid: Shape,
    window: Shape,
    block: tuple[int, int] = (128, 64),
    dilation: Shape = (1, 1, 1),
    max_stride: Shape | None = None,
) -> TileChoice:
    """The stride and tile shapes with the fewest visited tiles, for a window at least as large as asked for.

    Among equals the smallest stride wins, since a window that slides finely is centred better; then the
    window grows as far as it does for free.

    Args:
        grid, window, dilation: see :func:`simulate`.
        block: tokens of a query and a key tile: the products of the shapes to try.
        max_stride: largest strides to try; the window if left out.
    """
    limits = window if max_stride is None else max_stride
    best: tuple[tuple[int, int], Shape, Shape, Shape] | None = None
    for tile_q, tile_k in product(_shapes(block[0]), _shapes(block[1])):
        # Dimensions do not interact: each has its own best stride, and the visits multiply.
        axes = [_best_stride(*sizes) for sizes in zip(grid, window, limits, dilation, tile_q, tile_k, strict=True)]
        stride = (axes[0][1], axes[1][1], axes[2][1])
        key = (prod(visits for visits, _ in axes), sum(stride))
        if best is None or key < best[0]:
            best = key, stride, tile_q, tile_k
    assert best is not None
    (visited, _), stride, tile_q, tile_k = best
    grown = [_grow(*sizes) for sizes in zip(grid, window, stride, dilation, tile_q, tile_k, strict=True)]
    largest = (grown[0], grown[1], grown[2])
    return TileChoice(largest, stride, tile_q, tile_k, _cost(grid, largest, visited, prod(tile_q), prod(tile_k)))


def cheapest_tile(grid: Shape, window: Window) -> Shape:
    """The tile of ``window.block[1]`` tokens for which the kernels read the fewest blocks of a grid's.

    Blocks are those of :class:`~dit_accel.stages.order.simple.Tiles` in groups of the window's dilation, tightly
    packed. One that straddles two tiles counts as the smallest box around both, so that no count is too small. The
    window is the same under every tile: it is exact to the token.
    """
    layout, cpu = TokenLayout(grid, 0, prod(grid)), torch.device("cpu")
    visible = [table.float() for table in window.visibility(grid)]

    def cost(tile: Shape) -> tuple[int, int]:
        rows = Tiles(tile, window.dilation).rows(layout, cpu)
        blocks = SequenceBlocks(layout, rows, *window.block, cpu)
        read = torch.ones(blocks.num_blocks, dtype=torch.bool)
        for place, table in zip(blocks.coordinates, visible, strict=True):
            of_q, of_k = (_touched(place, len(table), size) for size in window.block)
            read &= of_q @ table @ of_k.T > 0
        # Among equals the one nearest to a cube, whose tokens attend alike.
        return int(read.sum()), sum(tile)

    return min(_shapes(window.block[1]), key=cost)


def _touched(place: torch.Tensor, length: int, block: int) -> torch.Tensor:
    """float32 ``[blocks, length]``, 1 where a block has a token of that coordinate."""
    number = torch.arange(len(place)) // block
    found = torch.zeros(int(number[-1]) + 1, length)
    found[number, place] = 1.0
    return found


def planned_cost(layout: TokenLayout, order: Order, window: Window) -> TileCost:
    """What this package's kernels visit: blocks of consecutive slots of an order, tightly packed.

    Unlike :func:`simulate` this counts blocks that straddle two tiles at a ragged border, and the rows and
    columns of text.
    """
    cpu = torch.device("cpu")
    blocks = SequenceBlocks(layout, order.rows(layout, cpu), *window.block, cpu)
    visited = int(window.prepare(blocks).keep[0].sum())
    sizes, _ = window.on_grid(layout.grid)
    visible = layout.num_latent * prod(sizes) + layout.seq_len**2 - layout.num_latent**2
    return TileCost(visited, prod(blocks.num_blocks), visible, layout.seq_len)


def _cost(grid: Shape, window: Shape, visited: int, block_q: int, block_k: int) -> TileCost:
    tokens = prod(grid)
    return TileCost(visited, -(-tokens // block_q) * -(-tokens // block_k), tokens * prod(window), tokens)


@lru_cache(maxsize=1 << 16)
def _visits(length: int, window: int, stride: int, dilation: int, tile_q: int, tile_k: int) -> int:
    """(query tile, key tile) pairs of one dimension, summed over its dilation groups."""
    total = 0
    for group in range(dilation):
        members = len(range(group, length, dilation))
        for first in range(0, members, tile_q):
            last = min(first + tile_q, members) - 1
            # Starts never decrease and windows of neighbours touch, so a tile's keys are one range.
            low = _start(first, members, window, stride)
            high = _start(last, members, window, stride) + window - 1
            total += high // tile_k - low // tile_k + 1
    return total


def _start(position: int, members: int, window: int, stride: int) -> int:
    leader = min(position // stride * stride + stride // 2, members - 1)
    return min(max(leader - window // 2, 0), members - window)


def _best_stride(length: int, window: int, limit: int, dilation: int, tile_q: int, tile_k: int) -> tuple[int, int]:
    strides = range(1, min(window, limit) + 1)
    return min((_visits(length, window, stride, dilation, tile_q, tile_k), stride) for stride in strides)


def _grow(length: int, window: int, stride: int, dilation: int, tile_q: int, tile_k: int) -> int:
    cost = _visits(length, window, stride, dilation, tile_q, tile_k)
    while (window + 1) * dilation <= length and (_visits(length, window + 1, stride, dilation, tile_q, tile_k) == cost):
        window += 1
    return window


def _shapes(size: int) -> Iterator[Shape]:
    for frames in range(1, size + 1):
        for height in range(1, size // frames + 1):
            if size % (frames * height) == 0:
                yield frames, height, size // (frames * height)
