"""Which key blocks each query block reads: the contract between selection and the attention kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from ..common.capability import choose_selection
from ..common.choice import Case
from .token_bits import unpack_tokens

if TYPE_CHECKING:
    from .query_pairs import QueryPairs


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Kept key blocks of every query block, as index lists.

    Names follow FlexAttention. Leading dimensions ``B`` and ``H`` may be 1, then they broadcast over batch
    and heads. Query block ``i`` covers rows ``[i * block_q, min((i + 1) * block_q, q_len))`` of the (possibly
    permuted) sequence, key block ``j`` likewise with ``block_k`` and ``kv_len``: only the last block of a
    sequence may be short.

    The first ``kv_num_full[b, h, i]`` entries of a row need no masking at all: the block is complete and
    every key in it is visible to every query of the row block. The entries from there up to
    ``kv_num_blocks[b, h, i]`` are *partial*: the kernel masks keys beyond ``kv_len``, keys that a
    ``key_mask`` hides, and keys that ``token_bits`` hides. Entries from ``kv_num_blocks`` on are undefined.

    Attributes:
        kv_num_blocks: int32 ``[B, H, nq]``, kept blocks per query block.
        kv_indices: int32 ``[B, H, nq, K]``, ``K <= nk``; ids of kept blocks, full ones first.
        kv_num_full: int32 ``[B, H, nq]``, how many leading entries are full.
        block_q, block_k: tokens in a query and in a key block.
        q_len, kv_len: tokens in the query and the key sequence.
        kv_bits: optional int32 ``[B, H, nq, K]``; for a partial entry the row of ``token_bits`` that holds
            its token mask, or -1 when no token of the block is hidden. Ignored for full entries.
        token_bits: optional int32 ``[P, block_q, block_k // 32]``; bit ``n % 32`` of word ``n // 32`` of row
            ``m`` says whether query ``m`` of the block sees key ``n`` of the block.
    """

    kv_num_blocks: torch.Tensor
    kv_indices: torch.Tensor
    kv_num_full: torch.Tensor
    block_q: int
    block_k: int
    q_len: int
    kv_len: int
    kv_bits: torch.Tensor | None = None
    token_bits: torch.Tensor | None = None
    # These lists in pairs of rows, where whoever made them made both at once, or a call did. What is made of a mask has
    # none: its blocks are others.
    paired: QueryPairs | None = field(default=None, init=False, repr=False)
    serves_many: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        nq, nk = self.num_blocks
        lead = tuple(self.kv_num_blocks.shape)
        if len(lead) != 3 or lead[2] != nq:
            raise ValueError(f"kv_num_blocks must be [B, H, {nq}] for {self.q_len} rows by {self.block_q}, got {lead}.")
        if tuple(self.kv_indices.shape[:3]) != lead or not 1 <= self.kv_indices.shape[3] <= nk:
            raise ValueError(
                f"kv_indices must be [{lead[0]}, {lead[1]}, {nq}, K] with 1 <= K <= {nk}, "
                f"got {tuple(self.kv_indices.shape)}."
            )
        if tuple(self.kv_num_full.shape) != lead:
            raise ValueError(f"kv_num_full must have kv_num_blocks' shape {lead}, got {tuple(self.kv_num_full.shape)}.")
        if (self.kv_bits is None) != (self.token_bits is None):
            raise ValueError("kv_bits and token_bits belong together: give both or neither.")

    @property
    def num_blocks(self) -> tuple[int, int]:
        """Number of query blocks and of key blocks."""
        return -(-self.q_len // self.block_q), -(-self.kv_len // self.block_k)

    def for_many_calls(self) -> BlockMask:
        """This very mask, whose lists nobody changes any more: what a call makes of them stays for the next ones."""
        object.__setattr__(self, "serves_many", True)
        return self

    def density(self) -> torch.Tensor:
        """Kept share of all block pairs as a 0-d float tensor on the mask's device (no host sync)."""
        return self.kv_num_blocks.mean(dtype=torch.float32) / self.num_blocks[1]

    @cached_property
    def token_density(self) -> torch.Tensor:
        """Share of all pairs of tokens that are seen, as a 0-d float tensor on the mask's device (no host sync): of a
        kept block the pairs that its token mask shows. Keys that a call's key mask hides count as seen."""
        nq, nk = self.num_blocks
        device = self.kv_indices.device
        # Only the last blocks may be short.
        short_q, short_k = self.q_len - (nq - 1) * self.block_q, self.kv_len - (nk - 1) * self.block_k
        rows, keys = torch.full((nq,), self.block_q, device=device), torch.full((nk,), self.block_k, device=device)
        rows[-1], keys[-1] = short_q, short_k
        # Entries behind the listed ones are undefined.
        block = self.kv_indices.long().clamp(0, nk - 1)
        seen = rows[:, None] * keys[block]
        slot = torch.arange(self.kv_indices.shape[-1], device=device)
        if self.token_bits is not None and self.kv_bits is not None:
            tokens = unpack_tokens(self.token_bits)
            # Of each token mask what it shows in a block that is whole, or short in keys, in queries, or in both.
            parts = [tokens[:, :m, :n].sum((1, 2)) for m in (self.block_q, short_q) for n in (self.block_k, short_k)]
            which = 2 * (torch.arange(nq, device=device) == nq - 1).int()[:, None] + (block == nk - 1).int()
            masked = (slot >= self.kv_num_full[..., None]) & (self.kv_bits >= 0)
            row = self.kv_bits.long().clamp(0, len(tokens) - 1)
            seen = torch.where(masked, torch.stack(parts)[which, row], seen)
        listed = slot < self.kv_num_blocks[..., None]
        return (seen * listed).float().sum((2, 3)).mean() / (self.q_len * self.kv_len)

    @classmethod
    def from_dense(
        cls,
        keep: torch.Tensor,
        block_q: int,
        block_k: int,
        q_len: int,
        kv_len: int,
        *,
        partial: torch.Tensor | None = None,
        bit_rows: torch.Tensor | None = None,
        token_bits: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> BlockMask:
        """Build the lists from a boolean block map, on its device and without a host sync.

        Args:
            keep: bool ``[B, H, nq, nk]``, the block pairs to read.
            partial: optional bool, broadcastable to ``keep``: pairs that need masking (a padded prompt's
                blocks, or pairs with a token mask). The short last key block is always partial.
            bit_rows: optional int32, broadcastable to ``keep``: row of ``token_bits`` for a pair, or -1.
            token_bits: see the class.
            backend: one of :data:`~dit_accel.kernels.BACKENDS`.
        """
        nk = keep.shape[-1]
        rank = torch.where(keep, 0, 2).to(torch.int8)
        if partial is not None:
            rank = rank + (partial & keep).to(torch.int8)
        if kv_len % block_k:
            rank[..., -1] = torch.where(keep[..., -1], 1, 2).to(torch.int8)
        if choose_selection(Case(keep.device), backend).name == "triton":
            # A sort of every row costs more than all else that a selection does.
            from .triton_lists import block_lists_triton

            indices, number, number_full = block_lists_triton(rank)
        else:
            indices = rank.argsort(dim=-1, stable=True).to(torch.int32)
            number, number_full = ((rank < bound).sum(-1, dtype=torch.int32) for bound in (2, 1))
        bits = None
        if bit_rows is not None:
            bits = bit_rows.to(torch.int32).expand(*keep.shape[:-1], nk).gather(-1, indices.long()).contiguous()
        return cls(
            kv_num_blocks=number,
            kv_indices=indices.contiguous(),
            kv_num_full=number_full,
            block_q=block_q,
            block_k=block_k,
            q_len=q_len,
            kv_len=kv_len,
            kv_bits=bits,
            token_bits=token_bits,
        )

    def to_dense(self) -> torch.Tensor:
        """Boolean block map ``[B, H, nq, nk]``; the inverse of :meth:`from_dense`."""
        nk = self.num_blocks[1]
        slot = torch.arange(self.kv_indices.shape[-1], device=self.kv_indices.device)
        listed = slot < self.kv_num_blocks[..., None]
        # Undefined entries go to an extra column, which is cut off.
        target = torch.where(listed, self.kv_indices.long(), nk)
        keep = torch.zeros(*self.kv_indices.shape[:3], nk + 1, dtype=torch.bool, device=self.kv_indices.device)
        return keep.scatter_(-1, target, True)[..., :nk]

    def partial_to_dense(self) -> torch.Tensor:
        """Boolean map ``[B, H, nq, nk]`` of the kept blocks that are not full."""
        return self.to_dense() & ~replace(self, kv_num_blocks=self.kv_num_full).to_dense()

    def bit_rows_to_dense(self) -> torch.Tensor | None:
        """int32 ``[B, H, nq, nk]``: row of ``token_bits`` of each partial block that has one, else -1; or None."""
        if self.kv_bits is None:
            return None
        nk = self.num_blocks[1]
        slot = torch.arange(self.kv_indices.shape[-1], device=self.kv_indices.device)
        partial = (slot >= self.kv_num_full[..., None]) & (slot < self.kv_num_blocks[..., None])
        target = torch.where(partial, self.kv_indices.long(), nk)
        rows = torch.full((*self.kv_indices.shape[:3], nk + 1), -1, dtype=torch.int32, device=self.kv_indices.device)
        return rows.scatter_(-1, target, torch.where(partial, self.kv_bits, -1))[..., :nk]

    def to_tokens(self) -> torch.Tensor:
        """Boolean token mask ``[B, H, q_len, kv_len]``: quadratic, for tests and the reference backend."""
        nq, nk = self.num_blocks
        lead = self.kv_indices.shape[:2]
        tokens = self.to_dense()[..., :, None, :, None].repeat(1, 1, 1, self.block_q, 1, self.block_k)
        if self.kv_bits is not None and self.token_bits is not None:
            shift = torch.arange(32, device=self.token_bits.device, dtype=torch.int32)
            unpacked = ((self.token_bits[..., None] >> shift) & 1).bool().flatten(-2)
            slot = torch.arange(self.kv_indices.shape[-1], device=self.kv_indices.device)
            masked = (
                (slot >= self.kv_num_full[..., None]) & (slot < self.kv_num_blocks[..., None]) & (self.kv_bits >= 0)
            )
            b, h, i, s = masked.nonzero(as_tuple=True)
            tokens[b, h, i, :, self.kv_indices[b, h, i, s].long()] = unpacked[self.kv_bits[b, h, i, s].long()]
        tokens = tokens.reshape(*lead, nq * self.block_q, nk * self.block_k)
        return tokens[..., : self.q_len, : self.kv_len]

    def for_queries(self, querying: torch.Tensor) -> BlockMask:
        """The same mask with nothing to read for the query blocks where bool ``[B|1, H|1, nq]`` is False."""
        lead = torch.broadcast_shapes(self.kv_num_blocks.shape, querying.shape)
        return replace(
            self,
            kv_num_blocks=torch.where(querying, self.kv_num_blocks, 0).expand(lead).contiguous(),
            kv_num_full=torch.where(querying, self.kv_num_full, 0).expand(lead).contiguous(),
            kv_indices=self.kv_indices.expand(*lead, -1).contiguous(),
            kv_bits=None if self.kv_bits is None else self.kv_bits.expand(*lead, -1).contiguous(),
        )

    def parts(self, queries: slice, keys: Sequence[slice], backend: str = "auto") -> list[BlockMask]:
        """The masks of a run of query blocks and, one each, of runs of key blocks; a run has at least one block.

        Args:
            queries: first block, and the one behind the last.
            keys: likewise, of each run.
            backend: see :meth:`from_dense`; in Triton a launch a run.
        """
        if choose_selection(Case(self.kv_indices.device), backend).name == "triton":
            from .triton_lists import cut_lists_triton

            return [cut_lists_triton(self, queries, span) for span in keys]
        q_len = min(queries.stop * self.block_q, self.q_len) - queries.start * self.block_q
        rows = replace(
            self,
            kv_num_blocks=self.kv_num_blocks[..., queries],
            kv_num_full=self.kv_num_full[..., queries],
            kv_indices=self.kv_indices[..., queries, :],
            kv_bits=None if self.kv_bits is None else self.kv_bits[..., queries, :],
            q_len=q_len,
        )
        keep, partial, bits = rows.to_dense(), rows.partial_to_dense(), rows.bit_rows_to_dense()
        return [
            BlockMask.from_dense(
                keep[..., span],
                self.block_q,
                self.block_k,
                q_len,
                min(span.stop * self.block_k, self.kv_len) - span.start * self.block_k,
                partial=partial[..., span],
                bit_rows=None if bits is None else bits[..., span],
                token_bits=self.token_bits,
                backend=backend,
            )
            for span in keys
        ]

    def trimmed(self) -> BlockMask:
        """The same mask with lists no longer than its longest row, for a mask that is kept; waits for the device."""
        longest = max(1, int(self.kv_num_blocks.max()))
        bits = None if self.kv_bits is None else self.kv_bits[..., :longest].contiguous()
        return replace(self, kv_indices=self.kv_indices[..., :longest].contiguous(), kv_bits=bits)

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask with every tensor on ``device``."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)
