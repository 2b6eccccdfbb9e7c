"""What one layer's sparse attention needs, and how the tokens of a sequence fall into blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from .kernels import BlockMask
from .layout import TokenLayout


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """The plan of one layer: token order and block mask. Schedules keep it, the engine executes it.

    Attributes:
        rows: int32 ``[B|1, H|1, S]``, token read by each slot of the permuted sequence; None for raster
            order.
        mask: kept blocks of the permuted sequence.
    """

    rows: torch.Tensor | None
    mask: BlockMask


@dataclass(frozen=True, eq=False)
class SequenceBlocks:
    """The blocks of a permuted sequence: which hold other tokens than latents, and where on the grid they
    lie.

    Attributes:
        layout: the sequence before permutation.
        rows: int ``[S]``, token at each slot; None is the identity.
        block_q, block_k: tokens in a query and in a key block.
        device: where the tensors live.
    """

    layout: TokenLayout
    rows: torch.Tensor | None
    block_q: int
    block_k: int
    device: torch.device

    @cached_property
    def latent_of_slot(self) -> torch.Tensor:
        """int64 ``[S]``: raster index on the grid of each slot's token, or -1 for any other token."""
        tokens = (
            torch.arange(self.layout.seq_len, device=self.device) if self.rows is None else self.rows.long()
        )
        latent = tokens - self.layout.latent_start
        return torch.where((latent >= 0) & (latent < self.layout.num_latent), latent, -1)

    @cached_property
    def coordinates(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Frame, row and column of each slot's token, int64 ``[S]`` each; meaningless where not latent."""
        _, height, width = self.layout.grid
        latent = self.latent_of_slot.clamp_min(0)
        return latent // (height * width), latent // width % height, latent % width

    def any_in_block(self, slots: torch.Tensor, block: int) -> torch.Tensor:
        """bool ``[..., n]`` from bool ``[..., S]``: blocks that hold at least one marked slot."""
        padded = F.pad(slots, (0, -slots.shape[-1] % block))
        return padded.unflatten(-1, (-1, block)).any(-1)

    @cached_property
    def forced_q(self) -> torch.Tensor | None:
        """bool ``[nq]``: query blocks with a non-latent token, which read everything; or None."""
        return self._with_extras(self.block_q)

    @cached_property
    def forced_k(self) -> torch.Tensor | None:
        """bool ``[nk]``: key blocks with a non-latent token, which everything reads; or None."""
        return self._with_extras(self.block_k)

    @cached_property
    def first_frame_k(self) -> torch.Tensor:
        """bool ``[nk]``: key blocks with a token of the first latent frame."""
        return self.any_in_block((self.latent_of_slot >= 0) & (self.coordinates[0] == 0), self.block_k)

    def hidden_k(self, key_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks with some, and blocks with only, hidden keys: two bool ``[B, nk]`` from bool ``[B, S]``."""
        visible = key_mask if self.rows is None else key_mask[:, self.rows.long()]
        return self.any_in_block(~visible, self.block_k), ~self.any_in_block(visible, self.block_k)

    def _with_extras(self, block: int) -> torch.Tensor | None:
        if not self.layout.num_extra:
            return None
        return self.any_in_block(self.latent_of_slot < 0, block)
