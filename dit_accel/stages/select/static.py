"""Key blocks chosen from the grid alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...call import AttentionCall
from ...kernels import BlockMask
from ...plan import LayerMemory, SequenceBlocks
from .protocol import Select, check_block
from .token_tables import TokenTables, separable, token_tables


@dataclass(frozen=True)
class DenseSelect(Select):
    """Every query reads every key: the call goes to the model's own attention, untouched."""

    is_dense: ClassVar[bool] = True
    is_static: ClassVar[bool] = True
    block: ClassVar[tuple[int, int]] = (128, 128)  # the kernels are fastest at these

    def select(
        self, blocks: SequenceBlocks, _tables: None, call: AttentionCall, _memory: LayerMemory | None = None
    ) -> BlockMask:
        """All blocks, ``[B|1, 1, nq, nk]``, for who wants a mask all the same."""
        return every_block(blocks, call)


@dataclass(frozen=True)
class FullSelect(Select):
    """Every query block reads every key block, in this package's kernels: for a precision or a compensation of
    its own without a choice of blocks.

    Attributes:
        block: tokens in a query and in a key block.
    """

    block: tuple[int, int] = (128, 64)
    is_static: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_block(self.block)

    def select(
        self, blocks: SequenceBlocks, _tables: None, call: AttentionCall, _memory: LayerMemory | None = None
    ) -> BlockMask:
        """Mask of all blocks, see :func:`every_block`."""
        return every_block(blocks, call)


def every_block(blocks: SequenceBlocks, call: AttentionCall) -> BlockMask:
    """Mask of all blocks but those without a visible key, ``[B|1, 1, nq, nk]``."""
    keep = torch.ones(1, 1, *blocks.num_blocks, dtype=torch.bool, device=blocks.device)
    partial = None
    if call.key_mask is not None:
        some_hidden, all_hidden = blocks.hidden_k(call.key_mask)
        keep, partial = keep & ~all_hidden[..., None, :], some_hidden[..., None, :]
    length = blocks.layout.seq_len
    return BlockMask.from_dense(
        keep, blocks.block_q, blocks.block_k, length, length, partial=partial, backend=call.backend("selection")
    )


@dataclass(frozen=True)
class Window(Select):
    """A neighbourhood on the latent grid, exact to the token: generalised neighbourhood attention.

    Semantics of GNA (arXiv 2504.16922, NATTEN): in each dimension a query sees ``window`` keys around the
    leader of its stride group, never fewer at a border, and only keys congruent to it modulo ``dilation``.
    ``stride`` 1 slides the window with each query; ``stride`` equal to ``window`` is blocked attention.

    Attributes:
        window: keys seen per dimension (frames, height, width): an int counts tokens, a float in (0, 1] is a
            share of the dimension, rounded up.
        stride: queries that share one window, per dimension, at most the window; where the window is a share
            of the dimension a larger stride counts as the window.
        dilation: distance between the keys of a window, per dimension.
        sink_first_frame: always read the whole first latent frame.
        block: tokens in a query and in a key block.
        whole: read every block that holds a visible token in full: it is loaded in any case.
    """

    window: tuple[int | float, int | float, int | float] = (1.0, 0.4, 0.4)
    stride: tuple[int, int, int] = (1, 1, 1)
    dilation: tuple[int, int, int] = (1, 1, 1)
    sink_first_frame: bool = False
    block: tuple[int, int] = (128, 64)
    whole: bool = False
    is_static: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("window", "stride", "dilation"):
            value = getattr(self, name)
            if len(value) != 3:
                raise ValueError(f"select.{name} needs three values (frames, height, width), got {value}.")
        for size in self.window:
            if size <= 0 or (isinstance(size, float) and size > 1.0):
                raise ValueError(
                    f"select.window must hold ints of at least 1 (tokens) or floats in (0, 1] (share of the "
                    f"dimension), got {self.window}."
                )
        for name in ("stride", "dilation"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"select.{name} must be at least 1 per dimension, got {getattr(self, name)}.")
        check_block(self.block)

    @property
    def hides_tokens(self) -> bool:
        """Whether single tokens of blocks that are kept may be hidden."""
        return not self.whole

    def visibility(self, grid: tuple[int, int, int]) -> list[torch.Tensor]:
        """Per dimension a bool ``[L, L]``: whether a query coordinate sees a key coordinate."""
        sizes, strides = self.on_grid(grid)
        return [
            _visible(length, size, stride, dilation, name)
            for name, length, size, stride, dilation in zip(
                ("frames", "height", "width"), grid, sizes, strides, self.dilation, strict=True
            )
        ]

    def on_grid(self, grid: tuple[int, int, int]) -> tuple[list[int], list[int]]:
        """Window and stride in tokens on a grid."""
        sizes = [
            self._size(size, length, dilation)
            for size, length, dilation in zip(self.window, grid, self.dilation, strict=True)
        ]
        strides = [
            min(stride, size) if isinstance(asked, float) else stride
            for stride, size, asked in zip(self.stride, sizes, self.window, strict=True)
        ]
        return sizes, strides

    def prepare(self, blocks: SequenceBlocks) -> TokenTables:
        """Work out a layout's kept block pairs, and the token masks of those at the window's edge."""
        visible = [table.to(blocks.device) for table in self.visibility(blocks.layout.grid)]
        return token_tables(blocks, separable(visible), self.sink_first_frame)

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

    @staticmethod
    def _size(size: int | float, length: int, dilation: int) -> int:
        if isinstance(size, float):
            # A share may not ask for more keys than a dilation group has.
            return max(1, min(math.ceil(size * length), length // dilation))
        return size


def _visible(length: int, window: int, stride: int, dilation: int, name: str) -> torch.Tensor:
    """bool ``[length, length]`` of one dimension."""
    if window * dilation > length:
        raise ValueError(
            f"select.window of {window} with dilation {dilation} spans {window * dilation} tokens, "
            f"but the grid has {length} in {name}; window x dilation may be at most {length}."
        )
    if stride > window:
        raise ValueError(f"select.stride may be at most the window, {window}, in {name}, got {stride}.")
    index = torch.arange(length)
    group, position = index % dilation, index // dilation
    group_length = (length - group + dilation - 1) // dilation
    leader = torch.minimum(position // stride * stride + stride // 2, group_length - 1)
    # The whole window is kept at the borders: it is shifted inwards, never cut.
    start = torch.minimum((leader - window // 2).clamp_min(0), group_length - window)
    same_group = group[:, None] == group[None, :]
    ahead = position[None, :] - start[:, None]
    return same_group & (ahead >= 0) & (ahead < window)
