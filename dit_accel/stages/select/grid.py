"""Further selections from the grid alone, all exact to the token."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ...call import AttentionCall
from ...kernels import BlockMask
from ...plan import LayerMemory, SequenceBlocks
from ..order.simple import fold_tile
from .protocol import Select, check_block
from .token_tables import Coordinates, TokenTables, separable, token_tables


@dataclass(frozen=True)
class _GridRule(Select):
    """What the selections here share: tables worked out once, and nothing read from queries and keys.

    Attributes:
        whole: read every block that holds a visible token in full: it is loaded in any case.
    """

    whole: bool = field(default=False, kw_only=True)
    is_static: ClassVar[bool] = True

    @property
    def hides_tokens(self) -> bool:
        """Whether single tokens of blocks that are kept may be hidden."""
        return not self.whole

    def select(
        self,
        blocks: SequenceBlocks,
        tables: TokenTables,
        call: AttentionCall,
        _memory: LayerMemory | None = None,
    ) -> BlockMask:
        """Mask of a layout, ``[1, H|1, nq, nk]``, or ``[B, H|1, nq, nk]`` where a key mask hides keys."""
        tables = tables.whole() if self.whole else tables
        return tables.mask(blocks, call.key_mask, call.backend("selection"))


@dataclass(frozen=True)
class TileWindow(_GridRule):
    """A window of whole tiles around the query's tile: sliding tile attention (STA, arXiv 2502.04507).

    At a border the window is shifted inwards, never cut, so every query sees as many tiles; a window larger
    than the grid sees all of it. Made for the order :class:`~dit_accel.stages.order.simple.Tiles` with the same
    tile, where on a grid that the tile divides no block is masked by token.

    Attributes:
        window: tiles seen per dimension (frames, height, width).
        tile: latent tokens of a tile per dimension; an image folds it as the order does.
        sink_first_frame: always read the whole first latent frame.
        block: tokens in a query and in a key block.
        whole: read every block that holds a visible token in full: it is loaded in any case.
    """

    window: tuple[int, int, int] = (3, 3, 3)
    tile: tuple[int, int, int] = (6, 8, 8)
    sink_first_frame: bool = False
    block: tuple[int, int] = (128, 64)

    def __post_init__(self) -> None:
        for name in ("window", "tile"):
            value = getattr(self, name)
            if len(value) != 3 or min(value) < 1:
                raise ValueError(f"select.{name} must be three sizes of at least 1, got {value}.")
        check_block(self.block)

    def prepare(self, blocks: SequenceBlocks) -> TokenTables:
        """Work out a layout's kept block pairs, and the token masks of those at the window's edge."""
        grid = blocks.layout.grid
        tile = fold_tile(self.tile, grid[0])
        visible = [self._visible(*sizes).to(blocks.device) for sizes in zip(grid, tile, self.window, strict=True)]
        return token_tables(blocks, separable(visible), self.sink_first_frame)

    @staticmethod
    def _visible(length: int, tile: int, window: int) -> torch.Tensor:
        own = torch.arange(length) // tile
        last_start = max(-(-length // tile) - window, 0)
        start = (own - window // 2).clamp(0, last_start)
        ahead = own[None, :] - start[:, None]
        return (ahead >= 0) & (ahead < window)


@dataclass(frozen=True)
class Circle(_GridRule):
    """A disc around the query: CLEAR (arXiv 2412.16112), for images.

    A query sees the keys of every frame whose distance in the image plane is below the radius; an image has
    one frame.

    Attributes:
        radius: in latent tokens; a key at exactly this distance is not seen.
        sink_first_frame: always read the whole first latent frame.
        block: tokens in a query and in a key block.
        whole: read every block that holds a visible token in full: it is loaded in any case.
    """

    radius: float = 16.0
    sink_first_frame: bool = False
    block: tuple[int, int] = (128, 64)

    def __post_init__(self) -> None:
        if self.radius <= 0:
            raise ValueError(f"select.radius must be above 0 latent tokens, got {self.radius}.")
        check_block(self.block)

    def prepare(self, blocks: SequenceBlocks) -> TokenTables:
        """Work out a layout's kept block pairs, and the token masks of those at the disc's edge."""

        def sees(queries: Coordinates, keys: Coordinates) -> torch.Tensor:
            rows = queries[1][:, None] - keys[1][None, :]
            cols = queries[2][:, None] - keys[2][None, :]
            return rows * rows + cols * cols < self.radius**2

        return token_tables(blocks, sees, self.sink_first_frame)


@dataclass(frozen=True)
class Radial(_GridRule):
    """A spatial band that halves whenever the distance in frames doubles: radial attention.

    With n tokens per frame, places p, p' counted along a frame and frames d apart (arXiv 2506.19852):
    frames at most 1 apart see each other in full; otherwise the width is ``decay * n / 2**floor(log2 d)``
    and a query sees the keys with ``|p - p'| + 1 <= width``. A width below ``min_width`` becomes
    ``min_width``, and in exchange only every ``ceil(min_width / width)``-th distance d is seen at all, so
    the number of visible pairs is O(n log n) in the number of frames.

    Attributes:
        decay: factor on the widths, in (0, 1].
        min_width: smallest band, in tokens. 1 is the paper's rule; a key block's size reads no more blocks
            for it.
        sink_first_frame: always read the whole first latent frame.
        block: tokens in a query and in a key block.
        whole: read every block that holds a visible token in full: it is loaded in any case.
    """

    decay: float = 0.2
    min_width: int = 64
    sink_first_frame: bool = True
    block: tuple[int, int] = (128, 64)

    def __post_init__(self) -> None:
        if not 0.0 < self.decay <= 1.0:
            raise ValueError(f"select.decay must lie in (0, 1], got {self.decay}.")
        if self.min_width < 1:
            raise ValueError(f"select.min_width must be at least 1 token, got {self.min_width}.")
        check_block(self.block)

    def widths(self, grid: tuple[int, int, int]) -> list[float]:
        """Band per distance in frames, in tokens; 0 where a distance is not seen."""
        frames, height, width = grid
        per_frame = height * width
        bands = []
        for distance in range(frames):
            band = self.decay * per_frame / 2 ** (max(distance, 1).bit_length() - 1)
            every = 1
            if band < self.min_width:
                every, band = math.ceil(self.min_width / band), float(self.min_width)
            if distance <= 1:
                bands.append(float(per_frame))
            else:
                bands.append(band if distance % every == 0 else 0.0)
        return bands

    def prepare(self, blocks: SequenceBlocks) -> TokenTables:
        """Work out a layout's kept block pairs, and the token masks of those at a band's edge."""
        grid = blocks.layout.grid
        bands = torch.tensor(self.widths(grid), dtype=torch.float64, device=blocks.device)

        def sees(queries: Coordinates, keys: Coordinates) -> torch.Tensor:
            place_q, place_k = queries[1] * grid[2] + queries[2], keys[1] * grid[2] + keys[2]
            apart = (queries[0][:, None] - keys[0][None, :]).abs()
            return (place_q[:, None] - place_k[None, :]).abs() + 1 <= bands[apart]

        return token_tables(blocks, sees, self.sink_first_frame)
