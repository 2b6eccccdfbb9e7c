"""A selection: near blocks, and every nth of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import dit_accel
from dit_accel.call import AttentionCall
from dit_accel.kernels import BlockMask
from dit_accel.plan import LayerMemory, SequenceBlocks
from dit_accel.stages.select.protocol import Select, check_block


@dit_accel.register("strided")
@dataclass(frozen=True)
class Strided(Select):
    """A query block reads key blocks near its own, and every nth block of the sequence.

    The pattern of Sparse Transformers (arXiv 1904.10509), on blocks.

    Attributes:
        near: tokens between the middles of two blocks that count as near.
        every: one of so many key blocks is read by all.
        block: tokens in a query and in a key block.
    """

    near: int = 128
    every: int = 8
    block: tuple[int, int] = (64, 64)
    is_static: ClassVar[bool] = True  # queries and keys are not looked at

    def __post_init__(self) -> None:
        if self.near < 0 or self.every < 1:
            raise ValueError(f"select.near must be at least 0 and select.every 1, got {self.near} and {self.every}.")
        check_block(self.block)

    def prepare(self, blocks: SequenceBlocks) -> torch.Tensor:
        """bool ``[B|1, H|1, nq, nk]``: the blocks to keep, worked out once for a size of the latents."""
        number_q, number_k = blocks.num_blocks
        middle_q = (torch.arange(number_q, device=blocks.device) + 0.5) * blocks.block_q
        middle_k = (torch.arange(number_k, device=blocks.device) + 0.5) * blocks.block_k
        least = max(self.block) / 2  # a query block always reads the keys at its own place
        keep = (middle_q[:, None] - middle_k).abs() <= max(self.near, least)
        keep |= torch.arange(number_k, device=blocks.device) % self.every == 0
        keep = keep[None, None]
        # Tokens on no grid, such as text, read all and are read by all.
        if blocks.forced_q is not None and blocks.forced_k is not None:
            keep = keep | blocks.forced_q[..., :, None] | blocks.forced_k[..., None, :]
        return keep

    def select(
        self, blocks: SequenceBlocks, tables: Any, call: AttentionCall, memory: LayerMemory | None = None
    ) -> BlockMask:
        keep, partial = tables, None
        if call.key_mask is not None:  # blocks without a visible key are left out, others masked in part
            some_hidden, all_hidden = blocks.hidden_k(call.key_mask)
            keep, partial = keep & ~all_hidden[..., None, :], some_hidden[..., None, :]
        length = blocks.layout.seq_len
        backend = call.backend("selection")
        return BlockMask.from_dense(keep, *self.block, length, length, partial=partial, backend=backend)
