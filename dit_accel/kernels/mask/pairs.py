"""A mask of token pairs, as a model passes it, laid over the blocks of a plan."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .block_mask import BlockMask
from .token_bits import distinct, pack_tokens, unpack_tokens


@dataclass(frozen=True, eq=False)
class PairMask:
    """Which key each query sees, by blocks of a permuted sequence.

    Attributes:
        seen_by: bool ``[B|1, H|1, nq, block_q, nk]``: whether a query of the block sees a key of the other block.
        whole: bool ``[B|1, H|1, nq, nk]``: whether every query sees every key.
        bit_rows: int32 ``[B|1, H|1, nq, nk]``: row of ``token_bits`` for pairs of blocks seen in part, else -1.
        token_bits: int32 ``[P, block_q, block_k // 32]``, see :class:`BlockMask`.
    """

    seen_by: torch.Tensor
    whole: torch.Tensor
    bit_rows: torch.Tensor
    token_bits: torch.Tensor

    @classmethod
    def of(cls, pairs: torch.Tensor, rows: torch.Tensor | None, block_q: int, block_k: int) -> PairMask:
        """Cut a mask into blocks. Waits for the device, since the number of distinct partial blocks is a shape.

        Args:
            pairs: bool ``[B|1, H|1, S, S]`` in the model's order, True where the query (third) sees the key (fourth).
            rows: int ``[B|1, H|1, S]``, the token at each slot; None for the model's order.
            block_q, block_k: tokens in a query and in a key block; the latter a multiple of 32.
        """
        if rows is not None:
            lead = torch.broadcast_shapes(pairs.shape[:2], rows.shape[:2])
            index = rows.long().expand(*lead, -1)
            pairs = pairs.expand(*lead, -1, -1)
            pairs = pairs.take_along_dim(index[..., None], 2).take_along_dim(index[..., None, :], 3)
        q_len, kv_len = pairs.shape[2:]
        pad = (0, -kv_len % block_k, 0, -q_len % block_q)
        blocks = F.pad(pairs, pad).unflatten(3, (-1, block_k)).unflatten(2, (-1, block_q))
        # Slots behind the end are no token's: they make no block partial.
        hidden = F.pad(~pairs, pad).unflatten(3, (-1, block_k)).unflatten(2, (-1, block_q))
        seen_by = blocks.any(-1)
        whole = ~hidden.any(-1).any(3)
        partial = seen_by.any(3) & ~whole
        bit_rows = torch.full(partial.shape, -1, dtype=torch.int32, device=pairs.device)
        token_bits = torch.zeros(1, block_q, block_k // 32, dtype=torch.int32, device=pairs.device)
        if partial.any():
            token_bits, row = distinct(pack_tokens(blocks.movedim(4, 3)[partial]))
            bit_rows[partial] = row.to(torch.int32)
        return cls(seen_by, whole, bit_rows, token_bits)

    @property
    def block_q(self) -> int:
        """Tokens of a query block."""
        return self.token_bits.shape[1]

    @property
    def block_k(self) -> int:
        """Tokens of a key block."""
        return self.token_bits.shape[2] * 32

    def blocks(self, seq_len: int, backend: str = "auto") -> BlockMask:
        """Every block with a pair that is seen, of a sequence of ``seq_len`` tokens."""
        return BlockMask.from_dense(
            self.visible,
            self.block_q,
            self.block_k,
            seq_len,
            seq_len,
            partial=~self.whole,
            bit_rows=self.bit_rows,
            token_bits=self.token_bits,
            backend=backend,
        )

    def every(self, stride: int) -> PairMask:
        """The mask of every n-th query of each block, in blocks of so many fewer queries.

        Args:
            stride: a divisor of ``block_q``.
        """
        return PairMask(self.seen_by[:, :, :, ::stride], self.whole, self.bit_rows, self.token_bits[:, ::stride])

    def tokens(self, first: int, stop: int) -> torch.Tensor:
        """bool ``[B|1, H|1, (stop - first) * block_q, nk * block_k]``: what queries of some blocks see.

        Slots behind the end of the sequence hold anything.
        """
        rows = self.bit_rows[:, :, first:stop, :, None, None]
        bits = unpack_tokens(self.token_bits)[rows[..., 0, 0].clamp_min(0).long()]
        seen = torch.where(rows >= 0, bits, self.whole[:, :, first:stop, :, None, None])
        return seen.transpose(3, 4).flatten(4).flatten(2, 3)

    @property
    def visible(self) -> torch.Tensor:
        """bool ``[B|1, H|1, nq, nk]``: pairs of blocks with a query that sees a key."""
        return self.seen_by.any(3)

    def over(self, mask: BlockMask, backend: str = "auto") -> BlockMask:
        """A plan's blocks without the pairs that this mask hides.

        A query block with a query of which the plan keeps no key that it sees, though it sees some, reads every block
        that it sees: no softmax is empty that is not so in the model.

        Args:
            mask: of the same sequence and blocks.
            backend: of the lists, one of :data:`~dit_accel.kernels.BACKENDS`.
        """
        keep = mask.to_dense()
        hidden_before = mask.partial_to_dense()
        bits_before = mask.bit_rows_to_dense()
        rows, table, seen_by = self._with(bits_before, mask)
        kept = (seen_by & keep[:, :, :, None]).any(-1)
        lost = (self.seen_by.any(-1) & ~kept).any(-1)[..., None]
        if bits_before is not None:
            rows, table, seen_by = self._with(bits_before.masked_fill(lost, -1), mask)
        keep = (keep | lost) & seen_by.any(3)
        return BlockMask.from_dense(
            keep,
            mask.block_q,
            mask.block_k,
            mask.q_len,
            mask.kv_len,
            partial=~self.whole | hidden_before | lost,
            bit_rows=rows.expand_as(keep),
            token_bits=table,
            backend=backend,
        )

    def _with(
        self, other_rows: torch.Tensor | None, other: BlockMask
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``bit_rows``, ``token_bits`` and ``seen_by`` of what both this mask and the bits of another one show."""
        if other_rows is None or other.token_bits is None:
            return self.bit_rows, self.token_bits, self.seen_by
        mine, theirs = torch.broadcast_tensors(self.bit_rows, other_rows)
        pairs, row = torch.stack([mine, theirs], -1).flatten(0, -2).unique(dim=0, return_inverse=True)
        everything = self.token_bits.new_full((1, *self.token_bits.shape[1:]), -1)
        ours, others = (torch.cat([bits, everything]) for bits in (self.token_bits, other.token_bits))
        both = ours[pairs[:, 0].long()] & others[pairs[:, 1].long()]  # row -1 is everything
        row = row.view(mine.shape)
        seen = (both != 0).any(-1)[row]
        inside = torch.arange(other.block_k, device=both.device) < (other.kv_len - 1) % other.block_k + 1
        # Bits behind the end of the sequence are no key's.
        seen[..., -1, :] = (both & pack_tokens(inside[None, None])[0] != 0).any(-1)[row[..., -1]]
        in_part = ((mine >= 0) | (theirs >= 0)) & self.visible
        seen_by = torch.where(in_part[:, :, :, None], seen.movedim(-1, 3), self.seen_by)
        return torch.where(in_part, row.to(torch.int32), -1), both, seen_by
