"""Key blocks chosen by the exact attention of a sample of tokens: PSA's importance."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ...call import AttentionCall
from ...kernels import BlockMask
from ...kernels.common.choice import Case, Choice, Operation
from ...kernels.common.scale import scale_of
from ...kernels.common.tokens import gather_rows
from ...kernels.selection.block_mass import block_mass, choose_block_mass
from ...plan import LayerMemory, SequenceBlocks
from .pooled import keep_best
from .protocol import Select, check_block, check_share

Slots = tuple[torch.Tensor, torch.Tensor]
"""int64 ``[n]`` each: sampled slots of the permuted queries and keys."""


@dataclass(frozen=True, eq=False)
class SampledMass:
    """Importance that a selection measured, for a compensation that asks for the same sample.

    Attributes:
        mass: float32 ``[B, H, nq, nk]``, see :func:`sampled_importance`.
        share, seed: of the sample.
    """

    mass: torch.Tensor
    share: float
    seed: int


@dataclass(frozen=True)
class Sampled(Select):
    """Keep the key blocks with the largest mass between sampled queries and sampled keys.

    In every block a share of the tokens is drawn, and their exact softmax is summed by block (PSA, ziplab,
    and BLADE). Per row the ``density`` share of the blocks with the most mass is kept, or the fewest that
    hold ``top_p`` of it; with both, the union.

    Attributes:
        density: kept share of the latent key blocks, in (0, 1]; None to use ``top_p`` alone.
        top_p: share of the sampled mass to keep, in (0, 1]; None to use ``density`` alone.
        share: sampled share of a block's tokens, in (0, 1].
        seed: of the sample; the same places are drawn in every block and call.
        block: tokens in a query and in a key block.
    """

    density: float | None = 0.2
    top_p: float | None = None
    share: float = 0.25
    seed: int = 0
    block: tuple[int, int] = (128, 64)
    has_density: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.density is None and self.top_p is None:
            raise ValueError("select needs a density, a top_p, or both; got neither.")
        for name in ("density", "top_p", "share"):
            check_share(name, getattr(self, name))
        check_block(self.block)

    def with_density(self, density: float) -> Sampled:
        return replace(self, density=density)

    def prepare(self, blocks: SequenceBlocks) -> Slots:
        """The places of the sample, on the device."""
        return sampled_slots(blocks, self.share, self.seed)

    def choices(self, case: Case, backend: str) -> dict[Operation, Choice]:
        """Block masses of the sample."""
        return {"block_mass": choose_sampled(case, self.share, backend)}

    def select(
        self,
        blocks: SequenceBlocks,
        tables: Slots,
        call: AttentionCall,
        memory: LayerMemory | None = None,
    ) -> BlockMask:
        """Mask of one call from its queries and keys."""
        mass = sampled_importance(
            call.q,
            call.k,
            blocks.block_q,
            blocks.block_k,
            rows=blocks.kernel_rows,
            key_mask=call.key_mask,
            scale=call.scale,
            share=self.share,
            slots=tables,
            backend=call.backend("block_mass"),
        )
        if memory is not None:
            memory.found = SampledMass(mass, self.share, self.seed)
        # The softmax over logarithms of masses is the masses' share of their sum.
        return keep_best(
            blocks,
            mass.log(),
            call.key_mask,
            density=self.density,
            top_p=self.top_p,
            hidden=call.hidden_blocks,
            backend=call.backend("selection"),
        )


def sampled_importance(
    q: torch.Tensor,
    k: torch.Tensor,
    block_q: int,
    block_k: int,
    *,
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    share: float = 0.25,
    seed: int = 0,
    slots: Slots | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Mass between a random sample of queries and keys, by block: float32 ``[B, H, nq, nk]``.

    Args:
        q, k: ``[B, S, H, D]``.
        rows, key_mask, scale: as everywhere.
        share: sampled share of a block's tokens; the same places in every block.
        seed: of the sample.
        slots: of the sample, in place of ``seed``, where they are at hand: making them waits for the device.
        backend: of the sample's block masses.
    """
    scale = scale_of(q, scale)
    if slots is None:
        slots_q, slots_k = (_sample(q.shape[1], block, share, seed).to(q.device) for block in (block_q, block_k))
    else:
        slots_q, slots_k = slots
    queries = gather_rows(q, slots_q[None, None] if rows is None else rows[..., slots_q])
    keys = gather_rows(k, slots_k[None, None] if rows is None else rows[..., slots_k])
    visible = None
    if key_mask is not None:
        index = slots_k[None, None] if rows is None else rows[..., slots_k].long()
        visible = torch.take_along_dim(key_mask[:, None].expand(-1, index.shape[1], -1), index, dim=2)
    count_q, count_k = _share_of(block_q, share), _share_of(block_k, share)
    if visible is not None and visible.shape[1] > 1:
        # Heads of different orders see different samples: one call each.
        each = [
            block_mass(
                queries[:, h : h + 1].transpose(1, 2),
                keys[:, h : h + 1].transpose(1, 2),
                block_q=count_q,
                block_k=count_k,
                key_mask=visible[:, h].contiguous(),
                scale=scale,
                backend=backend,
            )[0]
            for h in range(queries.shape[1])
        ]
        return torch.cat(each, 1)
    mass, _ = block_mass(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        block_q=count_q,
        block_k=count_k,
        key_mask=None if visible is None else visible[:, 0].contiguous(),
        scale=scale,
        backend=backend,
    )
    return mass


def choose_sampled(case: Case, share: float, backend: str) -> Choice:
    """The backend of :func:`sampled_importance`; raises a ValueError if it is refused."""
    if case.blocks is not None:
        block_q, block_k = case.blocks
        case = case._replace(blocks=(_share_of(block_q, share), _share_of(block_k, share)))
    return choose_block_mass(case, backend)


def sampled_slots(blocks: SequenceBlocks, share: float, seed: int) -> Slots:
    """Where :func:`sampled_importance` samples a layout."""
    length, device = blocks.layout.seq_len, blocks.device
    return (
        _sample(length, blocks.block_q, share, seed).to(device),
        _sample(length, blocks.block_k, share, seed).to(device),
    )


def _share_of(block: int, share: float) -> int:
    return max(1, round(share * block))


def _sample(seq_len: int, block: int, share: float, seed: int) -> torch.Tensor:
    places = torch.randperm(block, generator=torch.Generator().manual_seed(seed))
    kept = places[: _share_of(block, share)].sort().values
    slots = (torch.arange(0, seq_len, block)[:, None] + kept).flatten()
    # A short last block may hold none of the places: then its first token speaks for it.
    last = (seq_len - 1) // block * block
    slots = slots[slots < seq_len]
    return slots if bool((slots >= last).any()) else torch.cat([slots, torch.tensor([last])])
