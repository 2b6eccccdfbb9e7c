"""Key blocks chosen from the grid alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..kernels import BlockMask
from ..plan import SequenceBlocks

BLOCK_SIZES = (32, 64, 128)
# Token pairs whose visibility is worked out at once; bounds the memory of building a mask.
PAIRS_AT_ONCE = 1 << 26


def check_block(block: tuple[int, int]) -> None:
    """Raise unless ``block`` is a pair of block sizes that the kernels have."""
    if len(block) != 2 or any(size not in BLOCK_SIZES for size in block):
        raise ValueError(f"select.block must be two of {BLOCK_SIZES} tokens (query, key), got {block}.")


@dataclass(frozen=True, eq=False)
class WindowTables:
    """A window's block pairs on one layout.

    Attributes:
        keep: bool ``[nq, nk]``, pairs with at least one visible token pair.
        full: bool ``[nq, nk]``, pairs without a hidden token pair.
        bit_rows: int32 ``[nq, nk]``, row of ``token_bits`` of a kept pair that is not full, else -1.
        token_bits: int32 ``[P, block_q, block_k // 32]``, see :class:`~dit_accel.kernels.BlockMask`.
    """

    keep: torch.Tensor
    full: torch.Tensor
    bit_rows: torch.Tensor
    token_bits: torch.Tensor


@dataclass(frozen=True)
class DenseSelect:
    """Every query reads every key: the call goes to the model's own attention, untouched."""

    @property
    def is_static(self) -> bool:
        return True


@dataclass(frozen=True)
class Window:
    """A neighbourhood on the latent grid, exact to the token: generalised neighbourhood attention.

    Semantics of GNA (arXiv 2504.16922, NATTEN): in each dimension a query sees ``window`` keys around the
    leader of its stride group, never fewer at a border, and only keys congruent to it modulo ``dilation``.
    ``stride`` 1 slides the window with each query; ``stride`` equal to ``window`` is blocked attention.

    Attributes:
        window: keys seen per dimension (frames, height, width): an int counts tokens, a float in (0, 1] is a
            share of the dimension, rounded up.
        stride: queries that share one window, per dimension, at most the window.
        dilation: distance between the keys of a window, per dimension.
        sink_first_frame: always read the whole first latent frame.
        block: tokens in a query and in a key block.
    """

    window: tuple[int | float, int | float, int | float] = (1.0, 0.4, 0.4)
    stride: tuple[int, int, int] = (1, 1, 1)
    dilation: tuple[int, int, int] = (1, 1, 1)
    sink_first_frame: bool = False
    block: tuple[int, int] = (128, 64)

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
                raise ValueError(
                    f"select.{name} must be at least 1 per dimension, got {getattr(self, name)}."
                )
        check_block(self.block)

    @property
    def is_static(self) -> bool:
        return True

    def visibility(self, grid: tuple[int, int, int]) -> list[torch.Tensor]:
        """Per dimension a bool ``[L, L]``: whether a query coordinate sees a key coordinate."""
        names = ("frames", "height", "width")
        return [
            _visible(length, self._size(size, length, dilation), stride, dilation, name)
            for name, length, size, stride, dilation in zip(
                names, grid, self.window, self.stride, self.dilation, strict=True
            )
        ]

    def prepare(self, blocks: SequenceBlocks) -> WindowTables:
        """Work out a layout's kept block pairs, and the token masks of those at the window's edge."""
        visible = [table.to(blocks.device) for table in self.visibility(blocks.layout.grid)]
        return _window_tables(blocks, visible, self.sink_first_frame)

    def select(
        self,
        blocks: SequenceBlocks,
        tables: WindowTables,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None,
        scale: float | None,
    ) -> BlockMask:
        """Mask of a layout, ``[1, 1, nq, nk]``, or ``[B, 1, nq, nk]`` where ``key_mask`` hides keys."""
        keep, partial = tables.keep[None, None], ~tables.full[None, None]
        if key_mask is not None:
            some_hidden, all_hidden = blocks.hidden_k(key_mask)
            partial = partial | some_hidden[:, None, None, :]
            keep = keep & ~all_hidden[:, None, None, :]
        return BlockMask.from_dense(
            keep,
            blocks.block_q,
            blocks.block_k,
            blocks.layout.seq_len,
            blocks.layout.seq_len,
            partial=partial,
            bit_rows=tables.bit_rows[None, None],
            token_bits=tables.token_bits,
        )

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


def _window_tables(
    blocks: SequenceBlocks, visible: list[torch.Tensor], sink_first_frame: bool
) -> WindowTables:
    keep, full, pairs, bits = [], [], [], []
    for first, chunk in _token_chunks(blocks, visible, sink_first_frame):
        any_visible = chunk.any(3).any(1)
        all_visible = chunk.all(3).all(1)
        keep.append(any_visible)
        full.append(all_visible)
        i, j = (any_visible & ~all_visible).nonzero(as_tuple=True)
        pairs.append(torch.stack([i + first, j]))
        bits.append(_pack(chunk[i, :, j, :]))
    keep_map, full_map = torch.cat(keep), torch.cat(full)
    (i, j), packed = torch.cat(pairs, 1), torch.cat(bits)
    bit_rows = torch.full_like(keep_map, -1, dtype=torch.int32)
    if len(packed) == 0:
        packed = packed.new_zeros(1, *packed.shape[1:])
        return WindowTables(keep_map, full_map, bit_rows, packed)
    token_bits, row = _deduplicate(packed)
    bit_rows[i, j] = row.to(torch.int32)
    return WindowTables(keep_map, full_map, bit_rows, token_bits)


def _token_chunks(
    blocks: SequenceBlocks, visible: list[torch.Tensor], sink_first_frame: bool
) -> Iterator[tuple[int, torch.Tensor]]:
    """First query block and bool ``[blocks, block_q, nk, block_k]`` of successive groups of query blocks."""
    seq_len, block_q, block_k = blocks.layout.seq_len, blocks.block_q, blocks.block_k
    num_q, num_k = -(-seq_len // block_q), -(-seq_len // block_k)
    extra = blocks.latent_of_slot < 0
    always = extra | (blocks.coordinates[0] == 0) if sink_first_frame else extra
    step = max(1, PAIRS_AT_ONCE // (block_q * seq_len))
    for first in range(0, num_q, step):
        queries = slice(first * block_q, min((first + step) * block_q, seq_len))
        sees = extra[queries, None] | always[None, :]
        inside = torch.ones((), dtype=torch.bool, device=blocks.device)
        for table, coordinate in zip(visible, blocks.coordinates, strict=True):
            inside = inside & table[coordinate[queries]][:, coordinate]
        sees = sees | inside
        # Tokens past the end copy their block's visibility away: a missing query hides nothing, a missing key
        # counts as seen, and the kernel masks it by length.
        rows = -sees.shape[0] % block_q
        sees = torch.cat([sees, sees[-1:].expand(rows, -1)]) if rows else sees
        cols = -seq_len % block_k
        sees = torch.cat([sees, sees[:, -1:].expand(-1, cols)], 1) if cols else sees
        yield first, sees.view(-1, block_q, num_k, block_k)


def _pack(tokens: torch.Tensor) -> torch.Tensor:
    """int32 ``[P, block_q, block_k // 32]`` from bool ``[P, block_q, block_k]``."""
    weights = torch.ones(32, dtype=torch.int64, device=tokens.device) << torch.arange(
        32, device=tokens.device
    )
    words = (tokens.unflatten(-1, (-1, 32)).long() * weights).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _deduplicate(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct token masks and the row of each input: a window repeats itself over the grid."""
    flat = packed.flatten(1).long()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(1 << 62), 1 << 62, (flat.shape[1],), generator=generator).to(flat.device) | 1
    _, inverse = ((flat * weights).sum(1)).unique(return_inverse=True)
    count = int(inverse.max()) + 1
    first = torch.full((count,), len(flat), device=flat.device).scatter_reduce_(
        0, inverse, torch.arange(len(flat), device=flat.device), "amin"
    )
    if not torch.equal(packed[first][inverse], packed):  # a hash collision
        return packed, torch.arange(len(packed), device=packed.device)
    return packed[first].contiguous(), inverse
