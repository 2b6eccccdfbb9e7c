"""Launch configurations of the portable kernels: what one needs of a GPU's shared memory, and the next smaller one.

Nothing here asks a device. The need is counted from tiles and stages; ``benchmarks/cards.py`` compiles what can be
launched and compares.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..mask.block_mask import BlockMask

SMALLEST_TILE = 16
# Small tables of a launch: rows of a permutation, sums of rows, statistics of a tile of queries.
_TABLES = {"forward": 1 << 10, "backward_dq": 1 << 10, "backward_dkv": 5 << 10}


@dataclass(frozen=True)
class LaunchConfig:
    """Warps per program, software-pipelining depth, and the queries and keys that a program multiplies at once.

    A tile of None is the block's, or at most 64 tokens of the side that a backward kernel walks along: two tiles of
    scores must fit in registers.
    """

    num_warps: int
    num_stages: int
    tile_q: int | None = None
    tile_k: int | None = None

    def tiles(self, mask: BlockMask, op: str = "forward") -> tuple[int, int]:
        """Queries and keys of a tile; they divide the mask's blocks."""
        return self.tiles_of(mask.block_q, mask.block_k, op)

    def tiles_of(self, block_q: int, block_k: int, op: str) -> tuple[int, int]:
        """:meth:`tiles`, of block sizes."""
        most_q = 64 if op == "backward_dkv" else block_q
        most_k = 64 if op == "backward_dq" else block_k
        return min(self.tile_q or most_q, block_q), min(self.tile_k or most_k, block_k)


@dataclass(frozen=True)
class Work:
    """What a launch multiplies.

    Attributes:
        op: ``forward``, ``backward_dq`` or ``backward_dkv``.
        columns: of a tile, the head dim as it is padded.
        element_bytes: of queries, keys and values.
        has_bits: whether blocks are masked by token.
        permuted: whether rows are gathered.
        padded: whether the head dim is less than ``columns``, so that every read is masked.
    """

    op: str
    block_q: int
    block_k: int
    columns: int
    element_bytes: int
    has_bits: bool = False
    permuted: bool = False
    padded: bool = False

    def kept_and_walked(self, config: LaunchConfig) -> tuple[int, int]:
        """Rows of the tile that a program keeps, and of those that it walks along: keys for dK and dV, else queries."""
        tile_q, tile_k = config.tiles_of(self.block_q, self.block_k, self.op)
        return (tile_k, tile_q) if self.op == "backward_dkv" else (tile_q, tile_k)


# Who multiplies a tile of rows by itself: a warp (mma.sync, or AMD's waves of 32), four of them (wgmma, tcgen05) that
# read shared memory as they multiply, or AMD's waves.
Unit = Literal["warp", "warpgroup", "wave32", "wave64"]


def shared_bytes(work: Work, config: LaunchConfig, unit: Unit = "warp") -> int:
    """Bytes of shared memory that a launch needs at most.

    Of ``n`` stages one is in registers, so that there are ``n - 1`` buffers of what is walked along; for warpgroups
    there are ``n``. AMD's waves have what they keep in registers, and bring it there through the same memory first.
    """
    kept, walked = work.kept_and_walked(config)
    row = work.columns * work.element_bytes
    # Queries, or two of queries, gradients, keys and values.
    keeps = (1 if work.op == "forward" else 2) * kept * row
    scores = kept * walked * work.element_bytes
    if unit in ("wave32", "wave64"):
        pipeline = (2 * max(1, config.num_stages - 1) + (config.num_stages > 2)) * walked * row
        return max(keeps, pipeline) + scores + _TABLES[work.op]
    need = keeps + 2 * max(1, config.num_stages - (unit == "warp")) * walked * row
    # Weights go through shared memory where warps share out columns: where a tile has fewer rows than columns.
    if kept < work.columns or work.element_bytes == 4 or unit == "warpgroup":
        need += scores
    if work.has_bits:
        need += 4 * kept * walked
    return need + _TABLES[work.op]


def lowered(work: Work, config: LaunchConfig, limit: int, unit: Unit = "warp") -> LaunchConfig:
    """The configuration, or the first of ever smaller ones that needs at most ``limit`` bytes of shared memory.

    Raises:
        ValueError: not even the smallest tiles fit.
    """
    at = config
    while shared_bytes(work, at, unit) > limit:
        smaller = _smaller(work, at)
        if smaller is None:
            need = shared_bytes(work, at, unit)
            raise ValueError(
                f"No launch of {work.op} with head dims of {work.columns} fits {limit} bytes of shared memory, the "
                f"smallest takes {need}."
            )
        at = smaller
    return at


def _smaller(work: Work, config: LaunchConfig) -> LaunchConfig | None:
    """Fewer stages; then halves of the tile that is walked along, down to 32; then of the other; then down to 16."""
    kept, walked = work.kept_and_walked(config)
    if config.num_stages > 2:
        return replace(config, num_stages=config.num_stages - 1)
    for least in (32, SMALLEST_TILE):
        if walked > least:
            return _with_tiles(work, config, kept, walked // 2)
        if kept > least:
            # A warp multiplies 16 rows at a time, and one with fewer waits.
            warps = max(1, min(config.num_warps, kept // SMALLEST_TILE))
            return _with_tiles(work, replace(config, num_warps=warps), kept // 2, walked)
    return replace(config, num_stages=1) if config.num_stages > 1 else None


def _with_tiles(work: Work, config: LaunchConfig, kept: int, walked: int) -> LaunchConfig:
    tile_q, tile_k = (walked, kept) if work.op == "backward_dkv" else (kept, walked)
    return replace(config, tile_q=tile_q, tile_k=tile_k)


def quantized_launch(block_q: int, block_k: int, columns: int, unit: Unit) -> LaunchConfig:
    """Of the 8-bit forward: whole blocks, or where each warp multiplies by itself tiles that fit 64 KiB and its
    registers."""
    stages = 3 if columns <= 128 else 2
    if unit == "warpgroup":
        return LaunchConfig(8 if block_q * columns >= 128 * 128 else 4, stages)
    wide = columns > 128
    tile_q, tile_k = min(block_q, 64 if wide else 128), min(block_k, 32 if wide else 64)
    return LaunchConfig(8 if wide or tile_q == 128 else 4, stages, tile_q, tile_k)
