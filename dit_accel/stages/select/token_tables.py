"""Static selections that are exact to the token: from a rule on grid coordinates to block lists and bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ...kernels import BlockMask
from ...kernels.mask.token_bits import distinct, pack_tokens
from ...plan import SequenceBlocks

# Token pairs whose visibility is worked out at once; bounds the memory of building a mask.
PAIRS_AT_ONCE = 1 << 26

Coordinates = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Frame, row and column of tokens, int64 ``[n]`` each."""

Sees = Callable[[Coordinates, Coordinates], torch.Tensor]
"""bool ``[queries, keys]`` from the coordinates of latent queries and keys."""


@dataclass(frozen=True, eq=False)
class TokenTables:
    """The block pairs of a rule on one layout.

    Attributes:
        keep: bool ``[H|1, nq, nk]``, pairs with at least one visible token pair.
        full: bool ``[H|1, nq, nk]``, pairs without a hidden token pair.
        bit_rows: int32 ``[H|1, nq, nk]``, row of ``token_bits`` of a kept pair that is not full, else -1.
        token_bits: int32 ``[P, block_q, block_k // 32]``, see :class:`~dit_accel.kernels.BlockMask`.
    """

    keep: torch.Tensor
    full: torch.Tensor
    bit_rows: torch.Tensor
    token_bits: torch.Tensor

    def whole(self) -> TokenTables:
        """The same pairs of blocks, each read in full."""
        return TokenTables(
            self.keep, self.keep, torch.full_like(self.bit_rows, -1), torch.zeros_like(self.token_bits[:1])
        )

    def mask(self, blocks: SequenceBlocks, key_mask: torch.Tensor | None, backend: str = "auto") -> BlockMask:
        """Mask of a layout, ``[1, H|1, nq, nk]``, or ``[B, H|1, nq, nk]`` where ``key_mask`` hides keys."""
        keep, partial = self.keep[None], ~self.full[None]
        if key_mask is not None:
            some_hidden, all_hidden = blocks.hidden_k(key_mask)
            partial = partial | some_hidden[..., None, :]
            keep = keep & ~all_hidden[..., None, :]
        return BlockMask.from_dense(
            keep,
            blocks.block_q,
            blocks.block_k,
            blocks.layout.seq_len,
            blocks.layout.seq_len,
            partial=partial,
            bit_rows=self.bit_rows[None],
            token_bits=self.token_bits,
            backend=backend,
        )


def separable(visible: list[torch.Tensor]) -> Sees:
    """The rule of one bool ``[L, L]`` table per dimension: a key is seen if every dimension sees it."""

    def sees(queries: Coordinates, keys: Coordinates) -> torch.Tensor:
        frames, height, width = (table[q][:, k] for table, q, k in zip(visible, queries, keys, strict=True))
        return frames & height & width

    return sees


def token_tables(blocks: SequenceBlocks, sees: Sees, sink_first_frame: bool = False) -> TokenTables:
    """Work out a layout's kept block pairs, and the token masks of those at an edge.

    Latent queries see the latent keys that ``sees`` names, and with ``sink_first_frame`` the whole first
    frame of a video; every other token sees and is seen by all.
    """
    sink_first_frame = sink_first_frame and blocks.layout.grid[0] > 1
    if blocks.rows is None or blocks.rows.dim() == 1:
        return _tables_of([blocks], sees, sink_first_frame, None)
    # Heads that share an order share its tables.
    distinct, head_to_order = blocks.rows.unique(dim=0, return_inverse=True)
    orders = [SequenceBlocks(blocks.layout, rows, blocks.block_q, blocks.block_k, blocks.device) for rows in distinct]
    return _tables_of(orders, sees, sink_first_frame, head_to_order)


def seen_blocks(blocks: SequenceBlocks, sees: Sees, sink_first_frame: bool = False) -> torch.Tensor:
    """bool ``[H|1, nq, nk]``: pairs with any visible token pair, see :func:`token_tables`, of blocks of any size.
    Padding sees and is seen by none."""
    sink_first_frame = sink_first_frame and blocks.layout.grid[0] > 1

    def of_order(one: SequenceBlocks) -> torch.Tensor:
        found = []
        for first, chunk in _token_chunks(one, sees, sink_first_frame):
            if one.filler is not None:
                tokens = F.pad(~one.filler, (0, -one.layout.seq_len % one.block_k)).view(-1, one.block_k)
                queries = F.pad(~one.filler, (0, -one.layout.seq_len % one.block_q)).view(-1, one.block_q, 1, 1)
                chunk = chunk & tokens & queries[first : first + len(chunk)]
            found.append(chunk.any(3).any(1))
        return torch.cat(found)

    return of_each_order(blocks, of_order)


def of_each_order(blocks: SequenceBlocks, make: Callable[[SequenceBlocks], torch.Tensor]) -> torch.Tensor:
    """``[H|1, ...]``: what ``make`` gives for the blocks of one order, of each head's order; heads that share one share
    it."""
    if blocks.rows is None or blocks.rows.dim() == 1:
        return make(blocks)[None]
    distinct_rows, of_head = blocks.rows.unique(dim=0, return_inverse=True)
    return torch.stack([make(replace(blocks, rows=rows)) for rows in distinct_rows])[of_head]


def _tables_of(
    orders: list[SequenceBlocks], sees: Sees, sink_first_frame: bool, head_to_order: torch.Tensor | None
) -> TokenTables:
    keep, full, pairs, bits = [], [], [], []
    for index, blocks in enumerate(orders):
        for first, chunk in _token_chunks(blocks, sees, sink_first_frame):
            any_visible = chunk.any(3).any(1)
            all_visible = chunk.all(3).all(1)
            keep.append(any_visible)
            full.append(all_visible)
            i, j = (any_visible & ~all_visible).nonzero(as_tuple=True)
            pairs.append(torch.stack([torch.full_like(i, index), i + first, j]))
            bits.append(pack_tokens(chunk[i, :, j, :]))
    shape = (len(orders), *orders[0].num_blocks)
    keep_map, full_map = torch.cat(keep).view(shape), torch.cat(full).view(shape)
    (order, i, j), packed = torch.cat(pairs, 1), torch.cat(bits)
    bit_rows = torch.full_like(keep_map, -1, dtype=torch.int32)
    if len(packed) == 0:
        token_bits = packed.new_zeros(1, *packed.shape[1:])
    else:
        token_bits, row = distinct(packed)
        bit_rows[order, i, j] = row.to(torch.int32)
    if head_to_order is not None:
        keep_map, full_map = keep_map[head_to_order], full_map[head_to_order]
        bit_rows = bit_rows[head_to_order]
    return TokenTables(keep_map, full_map, bit_rows, token_bits)


def _token_chunks(blocks: SequenceBlocks, sees: Sees, sink_first_frame: bool) -> Iterator[tuple[int, torch.Tensor]]:
    """First query block and bool ``[blocks, block_q, nk, block_k]`` of successive groups of query blocks."""
    seq_len, block_q, block_k = blocks.layout.seq_len, blocks.block_q, blocks.block_k
    num_q, num_k = blocks.num_blocks
    extra = blocks.latent_of_slot < 0
    always = extra | (blocks.coordinates[0] == 0) if sink_first_frame else extra
    keys = blocks.coordinates
    step = max(1, PAIRS_AT_ONCE // (block_q * seq_len))
    for first in range(0, num_q, step):
        part = slice(first * block_q, min((first + step) * block_q, seq_len))
        queries = (keys[0][part], keys[1][part], keys[2][part])
        seen = extra[part, None] | always[None, :] | sees(queries, keys)
        # Tokens past the end copy their block's visibility away: a missing query hides nothing, a missing key
        # counts as seen, and the kernel masks it by length.
        rows = -seen.shape[0] % block_q
        seen = torch.cat([seen, seen[-1:].expand(rows, -1)]) if rows else seen
        cols = -seq_len % block_k
        seen = torch.cat([seen, seen[:, -1:].expand(-1, cols)], 1) if cols else seen
        yield first, seen.view(-1, block_q, num_k, block_k)
