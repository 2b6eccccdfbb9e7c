"""What one layer's sparse attention needs, and how the tokens of a sequence fall into blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from .kernels import BlockMask
from .kernels.mask.cuts import MaskCuts
from .kernels.mask.packed import PackedBlockMask
from .layout import StepContext, TokenLayout


def tokens_on_grids(layout: TokenLayout, device: torch.device) -> torch.Tensor:
    """bool ``[S]``: whether a token lies on a grid, of what is generated or of a reference, or fills a block of one."""
    found = torch.zeros(layout.seq_len, dtype=torch.bool, device=device)
    found[layout.seq_len - layout.padding :] = True
    for part in layout.grids:
        found[part.start : part.stop] = True
    return found


@dataclass(frozen=True, eq=False)
class PlanShares:
    """What processes around a ring have of one plan that is kept, worked out once.

    Attributes:
        blocks: of its mask.
        negligible: of the mask that its compensation made.
        work: kept share of the blocks of each process' queries, float ``[n]``, by how many blocks these are.
    """

    blocks: MaskCuts = field(default_factory=MaskCuts)
    negligible: MaskCuts = field(default_factory=MaskCuts)
    work: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """The plan of one layer: token order and block mask. Schedules keep it, the engine executes it.

    Attributes:
        rows: int32 ``[B|1, H|1, S]``, token read by each slot of the permuted sequence; None for raster
            order.
        kept: :attr:`mask`, or its bits.
        compensation: what the recipe's compensation worked out for the blocks left out.
        share: :attr:`density` where it is known, of a plan that serves many steps.
        keys: int32 ``[B, H, S]``, token whose key and value take each token's place; None where all keep theirs.
        shares: what processes around a ring have of a plan that is kept; None of others.
        counted: share of the work of dense attention, 0-d, since a call under the plan was counted.
    """

    rows: torch.Tensor | None
    kept: BlockMask | PackedBlockMask
    compensation: Any = None
    share: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    shares: PlanShares | None = field(default=None, init=False)
    counted: torch.Tensor | None = field(default=None, init=False)

    @cached_property
    def mask(self) -> BlockMask:
        """Kept blocks of the permuted sequence; unpacked when they are first read."""
        if not isinstance(self.kept, PackedBlockMask):
            return self.kept
        # Small lists outlive the call, and a training may save for its backward what a validation made.
        with torch.inference_mode(False):
            return self.kept.lists()

    def with_shares(self, shares: PlanShares) -> AttentionPlan:
        """This very plan, which is kept: what is worked out for a ring stays. One of another mask (``replace``) has
        none."""
        object.__setattr__(self, "shares", shares)
        return self

    def work(self, of: Callable[[AttentionPlan], torch.Tensor]) -> torch.Tensor:
        """:attr:`counted`, by ``of`` at the first call: a plan serves many, and three small kernels count it."""
        counted = self.counted
        if counted is None:
            counted = of(self)
            object.__setattr__(self, "counted", counted)
        return counted

    @cached_property
    def density(self) -> torch.Tensor:
        """Kept share of the block pairs, a 0-d tensor."""
        return self.mask.density() if self.share is None else self.share

    @property
    def key_rows(self) -> torch.Tensor | None:
        """:attr:`rows` of the keys: the token whose key each slot of the permuted sequence holds."""
        if self.keys is None or self.rows is None:
            return self.rows if self.keys is None else self.keys
        return self.keys.gather(-1, self.rows.long().expand(self.keys.shape))

    @cached_property
    def querying(self) -> torch.Tensor:
        """Share of the query blocks that read anything, a 0-d tensor: the others hold no token that queries."""
        return (self.mask.kv_num_blocks > 0).float().mean()


@dataclass(frozen=True, eq=False)
class LeftOut:
    """What a plan left out of a dense step.

    Attributes:
        made: the step.
        difference: ``[B, S, H, D]``, dense less sparse attention of the tokens that query, around a ring of this
            process' slots; in the call's dtype, or int8.
        scale: of int8, float32 ``[B, S, H, 1]``: one for each token and head.
        witness: 0-d, zero, or NaN where the difference holds one.
    """

    made: StepContext
    difference: torch.Tensor
    scale: torch.Tensor | None
    witness: torch.Tensor

    @classmethod
    def of(cls, made: StepContext, difference: torch.Tensor, bits: int = 16) -> LeftOut:
        """A difference of this step, kept as it is or in 8 bits."""
        witness, scale = difference.sum(dtype=torch.float32) * 0.0, None
        if bits == 8:
            scale = (difference.abs().amax(-1, keepdim=True).float() / 127).clamp_min(torch.finfo(torch.float32).tiny)
            difference = (difference / scale).round_().to(torch.int8)
        return cls(made, difference, scale, witness)

    def add_to(self, out: torch.Tensor, share: float) -> None:
        """Add a share of the difference to ``[B, S, H, D]``, in place."""
        if self.scale is None:
            out.add_(self.difference, alpha=share)
        else:
            # Summed in float32: in half precision the scale would lose as much as the 8 bits, or become zero.
            out.addcmul_(self.difference, self.scale * share)


@dataclass
class LayerMemory:
    """What one layer remembers of one guidance branch between plans; the engine keeps one per trajectory.

    Attributes:
        lse: float32 ``[B, H, S]``, log-sum-exp of the queries at an earlier search, in the model's order.
        keeps_base: whether a search is to leave ``base``.
        base: float16 ``[B, H, nq, nk]``, of the last search: what a selection chooses from anew in later steps.
        found: what the selection worked out on its way, for the compensation of the same plan; the engine drops
            it when the plan is made.
        left_out: of the last dense step that a compensation watched.
    """

    lse: torch.Tensor | None = None
    keeps_base: bool = False
    base: torch.Tensor | None = None
    found: Any = None
    left_out: LeftOut | None = None


@dataclass(frozen=True, eq=False)
class SequenceBlocks:
    """The blocks of a permuted sequence: which hold tokens on no grid, and where on the grid others lie.

    Attributes:
        layout: the sequence before permutation.
        rows: int ``[S]``, token at each slot; ``[H, S]`` or ``[B, H, S]`` with an order per head; None is the
            identity.
        block_q, block_k: tokens in a query and in a key block.
        device: where the tensors live.
    """

    layout: TokenLayout
    rows: torch.Tensor | None
    block_q: int
    block_k: int
    device: torch.device

    @cached_property
    def kernel_rows(self) -> torch.Tensor | None:
        """``rows`` as the kernels take them, int32 ``[B|1, H|1, S]``."""
        if self.rows is None:
            return None
        return self.rows.to(torch.int32).reshape((1,) * (3 - self.rows.dim()) + tuple(self.rows.shape))

    @property
    def num_blocks(self) -> tuple[int, int]:
        """Number of query blocks and of key blocks."""
        return -(-self.layout.seq_len // self.block_q), -(-self.layout.seq_len // self.block_k)

    @property
    def token_of_slot(self) -> torch.Tensor:
        """int64, shape of ``rows``: the token at each slot."""
        return torch.arange(self.layout.seq_len, device=self.device) if self.rows is None else self.rows.long()

    @cached_property
    def latent_of_slot(self) -> torch.Tensor:
        """int64, shape of ``rows``: raster index of each slot's token on the grid of what is generated, or -1."""
        latent = self.token_of_slot - self.layout.latent_start
        return torch.where((latent >= 0) & (latent < self.layout.num_latent), latent, -1)

    @cached_property
    def filler(self) -> torch.Tensor | None:
        """bool, shape of ``rows``: slots of padding, whose tokens nobody sees; None where there is none."""
        if not self.layout.padding:
            return None
        return self.token_of_slot >= self.layout.seq_len - self.layout.padding

    @cached_property
    def coordinates(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Frame, row and column of each slot's token, int64 each; meaningless where not latent."""
        _, height, width = self.layout.grid
        latent = self.latent_of_slot.clamp_min(0)
        return latent // (height * width), latent // width % height, latent % width

    def any_in_block(self, slots: torch.Tensor, block: int) -> torch.Tensor:
        """bool ``[..., n]`` from bool ``[..., S]``: blocks that hold at least one marked slot."""
        padded = F.pad(slots, (0, -slots.shape[-1] % block))
        return padded.unflatten(-1, (-1, block)).any(-1)

    @cached_property
    def forced_q(self) -> torch.Tensor | None:
        """bool ``[B|1, H|1, nq]``: query blocks with a token on no grid, which read everything; or None."""
        return self._with_extras(self.block_q)

    @cached_property
    def forced_k(self) -> torch.Tensor | None:
        """bool ``[B|1, H|1, nk]``: key blocks with a token on no grid, which everything reads; or None."""
        return self._with_extras(self.block_k)

    @cached_property
    def querying_q(self) -> torch.Tensor | None:
        """bool ``[B|1, H|1, nq]``: query blocks with a token that queries; None where all tokens do."""
        if self.layout.queries is None:
            return None
        first, number = self.layout.queries
        token = self.token_of_slot
        return self._lead(self.any_in_block((token >= first) & (token < first + number), self.block_q))

    @cached_property
    def open_k(self) -> torch.Tensor:
        """bool ``[B|1, H|1, nk]``: key blocks of tokens on grids alone."""
        if self.forced_k is None:
            return torch.ones(1, 1, self.num_blocks[1], dtype=torch.bool, device=self.device)
        return ~self.forced_k

    @cached_property
    def tokens_k(self) -> torch.Tensor:
        """float32 ``[nk]``: tokens in each key block; all but the last have as many."""
        first = torch.arange(self.num_blocks[1], device=self.device) * self.block_k
        return (self.layout.seq_len - first).clamp(max=self.block_k).float()

    @cached_property
    def first_frame_k(self) -> torch.Tensor:
        """bool ``[B|1, H|1, nk]``: key blocks with a token of a video's first latent frame; none for an
        image."""
        first = (self.latent_of_slot >= 0) & (self.coordinates[0] == 0) & (self.layout.grid[0] > 1)
        return self._lead(self.any_in_block(first, self.block_k))

    @cached_property
    def extra_slots(self) -> torch.Tensor | None:
        """int64 ``[n]``: slots of all tokens in the key blocks of :attr:`forced_k`; or None. They are the
        same for all heads, since every order keeps tokens on no grid in their own order."""
        if self.forced_k is None:
            return None
        return self.forced_k[0, 0].repeat_interleave(self.block_k)[: self.layout.seq_len].nonzero()[:, 0]

    @cached_property
    def latent_tokens(self) -> torch.Tensor:
        """bool ``[S]`` in the model's order: whether a token is a latent, of what is generated or of a reference."""
        return tokens_on_grids(self.layout, self.device)

    def hidden_k(self, key_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks with some, and with only, hidden keys: two bool ``[B, H|1, nk]`` from bool ``[B, S]``."""
        visible = key_mask[:, None]
        if self.kernel_rows is not None:
            visible = torch.take_along_dim(visible, self.kernel_rows.long(), dim=2)
        return self.any_in_block(~visible, self.block_k), ~self.any_in_block(visible, self.block_k)

    def _with_extras(self, block: int) -> torch.Tensor | None:
        if not self.layout.num_extra:
            return None
        return self._lead(self.any_in_block(~self.latent_tokens[self.token_of_slot], block))

    @staticmethod
    def _lead(per_block: torch.Tensor) -> torch.Tensor:
        return per_block.reshape((1,) * (3 - per_block.dim()) + tuple(per_block.shape))
