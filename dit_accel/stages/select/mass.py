"""Key blocks chosen by the exact attention mass of block pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ...call import AttentionCall
from ...heads import HeadShard
from ...kernels import BlockMask, block_sparse_attention
from ...kernels.common.choice import Case, Choice, Operation, case_of
from ...kernels.common.tokens import gather_mask
from ...kernels.mask.pairs import PairMask
from ...kernels.selection.api import own_blocks
from ...kernels.selection.block_mass import block_mass, choose_block_mass, strided_block_mass
from ...kernels.selection.shared_budget import best_of_all
from ...layout import TokenLayout
from ...plan import LayerMemory, SequenceBlocks
from ...ring import RingPart
from .means import value_means
from .pooled import candidates, keep_best, keep_chosen, pooled_scores_of
from .protocol import (
    HeadDensities,
    Select,
    check_block,
    check_head_densities,
    check_share,
    density_of_layer,
    shares_per_head,
)

MOVED_BY = 0.5
"""Power of the change of pooled weights that a search's masses are moved by: the best of 0, .25, .5, .75 and 1 on
recorded calls (docs/laboratory.md)."""
LEAST_SHARE = 1e-6
"""Of a row's mass: what a block without any is given, so that it can be moved."""


@dataclass(frozen=True)
class Mass(Select):
    """Keep the key blocks with the largest softmax mass (AdaSpa), or those whose absence would change the output most.

    The mass of a block pair is the sum of the exact attention probabilities in it (arXiv 2502.21079). The
    first search of a run takes the log-sum-exp of every query from the dense attention of its step, or computes
    it where it cannot, and remembers it; later searches normalise with it, in one pass instead of two.

    Attributes:
        density: kept share of the latent key blocks, in (0, 1]; the mean over the heads.
        head_adaptive: give heads whose mask recalls little mass more blocks and heads with high recall
            fewer. Of ``n = min(heads with recall above recall_target, heads // 2)`` best heads the density
            is halved, and that of the n worst heads raised as much.
        recall_target: share of the mass that a head's mask must hold to count as well recalled.
        cache_lse: normalise later searches with the first search's log-sum-exp, as the paper does; else each search
            takes that of its own step.
        block: tokens in a query and in a key block.
        head_densities: in place of ``density`` and of ``head_adaptive``, see
            :class:`~dit_accel.stages.select.pooled.Pooled`.
        score: "mass", or "error": the mass times the distance between the mean value of the key block and the mean
            output of the query block, which is about what leaving the pair out changes in the output. Error-aware
            routing (SVG-EAR, arXiv 2603.08982) ranks by an estimate of the same.
        budget: "row": every query block reads as many key blocks; "head", "layer": as many pairs in all, chosen among
            all rows of a head or of all heads, with each row's own blocks and its best one. Not the paper's.
        query_stride: one query of every n in a block stands for all: a search takes about so much less time. It must
            divide a query block. Not the paper's, whose masses are of all queries.
    """

    density: float = 0.2
    head_adaptive: bool = True
    recall_target: float = 0.8
    cache_lse: bool = True
    block: tuple[int, int] = (64, 64)
    head_densities: HeadDensities = ()
    query_stride: int = 1
    score: str = "mass"
    budget: str = "row"
    has_density: ClassVar[bool] = True
    has_head_densities: ClassVar[bool] = True
    can_choose_anew: ClassVar[bool] = True
    goes_round: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("density", self.density)
        check_share("recall_target", self.recall_target)
        if self.score not in ("mass", "error"):
            raise ValueError(f"select.score must be mass or error, got {self.score!r}.")
        if self.budget not in ("row", "head", "layer"):
            raise ValueError(f"select.budget must be row, head or layer, got {self.budget!r}.")
        if self.budget != "row" and self.head_adaptive:
            raise ValueError(
                f"select.head_adaptive moves blocks between heads whose rows are alike; it needs select.budget row, "
                f"got {self.budget}."
            )
        if self.budget == "layer" and self.head_densities:
            raise ValueError("select.head_densities give each head a budget of its own; select.budget layer has one.")
        check_block(self.block)
        check_head_densities(self.head_densities)
        if self.query_stride < 1 or self.block[0] % self.query_stride:
            raise ValueError(
                f"select.query_stride must divide a query block of {self.block[0]} tokens, got {self.query_stride}."
            )

    def with_density(self, density: float) -> Mass:
        return replace(self, density=density, head_densities=())

    def of_layer(self, layer: int) -> Mass:
        densities = density_of_layer(self.head_densities, layer)
        return self if densities is self.head_densities else replace(self, head_densities=densities)

    def uses_lse(self, _layout: TokenLayout, _key_mask: torch.Tensor | None) -> bool:
        """Whether the log-sum-exp of the call's dense attention would spare :meth:`select` a pass."""
        return True

    def choices(self, case: Case, backend: str) -> dict[Operation, Choice]:
        """Block masses."""
        if case.blocks is not None:
            case = case._replace(blocks=(case.blocks[0] // self.query_stride, case.blocks[1]))
        return {"block_mass": choose_block_mass(case, backend)}

    def select(
        self,
        blocks: SequenceBlocks,
        _tables: None,
        call: AttentionCall,
        memory: LayerMemory | None = None,
    ) -> BlockMask:
        """Mask of one call from its queries and keys."""
        mass, lse = self._mass(blocks, call, None if memory is None else memory.lse)
        if memory is not None:
            memory.lse = lse if self.cache_lse else None
        if memory is not None and memory.keeps_base:
            share = mass / mass.sum(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
            memory.base = ((share + LEAST_SHARE).log() - MOVED_BY * pooled_scores_of(blocks, call, call.scale)).half()
        return self._chosen(blocks, call, mass)

    def choose_anew(self, blocks: SequenceBlocks, call: AttentionCall, memory: LayerMemory) -> BlockMask:
        """Mask of a call by the masses of the last search, moved by what the scores of block means changed since.

        A mass is multiplied by the square root of the change of its pooled weight, and a row's masses are made to add
        up to its queries again: what a head reads changes little between steps, and pooled scores tell some of it.
        """
        assert memory.base is not None
        moved = memory.base.float() + MOVED_BY * pooled_scores_of(blocks, call, call.scale)
        first = torch.arange(blocks.num_blocks[0], device=blocks.device) * blocks.block_q
        queries = (blocks.layout.seq_len - first).clamp(max=blocks.block_q)
        return self._chosen(blocks, call, moved.softmax(-1) * queries[:, None])

    def _chosen(self, blocks: SequenceBlocks, call: AttentionCall, mass: torch.Tensor) -> BlockMask:
        if self.score == "error":
            mass = error_of(blocks, call, mass)
        return self._keep(blocks, mass, call.key_mask, call.hidden_blocks, call.backend("selection"), call.heads)

    def scores(self, blocks: SequenceBlocks, _tables: None, call: AttentionCall) -> torch.Tensor:
        """Block masses, or the errors."""
        mass = self._mass(blocks, call, None)[0]
        return mass if self.score == "mass" else error_of(blocks, call, mass)

    def chosen_by(
        self, blocks: SequenceBlocks, scores: torch.Tensor, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What one call with these masses would keep."""
        return self._keep(blocks, scores, hidden=hidden).to_dense()

    def _mass(
        self, blocks: SequenceBlocks, call: AttentionCall, lse: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Masses, and the log-sum-exp of all queries if it is known."""
        return mass_of_call(blocks, call, lse, call.key_mask, call.seen, self.query_stride)

    def _keep(
        self,
        blocks: SequenceBlocks,
        mass: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        backend: str = "auto",
        heads: HeadShard | None = None,
    ) -> BlockMask:
        shares = shares_per_head(self.head_densities, self.density, mass.shape[1], mass.device, heads)
        assert shares is not None
        if self.budget != "row":
            allowed, own = pairs_to_choose(blocks, key_mask, hidden)
            if self.budget == "head":
                chosen = best_of_all(mass, allowed, own, shares, across_heads=False)
            elif heads is None:
                chosen = best_of_all(mass, allowed, own, shares, across_heads=True)
            else:  # the layer's heads share one budget, whoever attends them
                if blocks.rows is not None and blocks.rows.dim() > 1:
                    allowed, own = (
                        heads.gather(one.expand(-1, heads.number, -1, -1).float()) > 0 for one in (allowed, own)
                    )
                chosen = heads.own(best_of_all(heads.gather(mass), allowed, own, shares, across_heads=True), 1)
            return keep_chosen(blocks, chosen, key_mask, backend)
        mask = keep_best(blocks, mass, key_mask, density=shares, hidden=hidden, backend=backend)
        if not self.head_adaptive or self.head_densities or (mass.shape[1] if heads is None else heads.total) < 2:
            return mask
        recalls = recall(mass, mask)
        # The layer's heads share one budget, whoever attends them.
        density = adapted_densities(
            recalls if heads is None else heads.gather(recalls), self.density, self.recall_target
        )
        if heads is not None:
            density = heads.own(density, 1)
        return keep_best(blocks, mass, key_mask, density=density, hidden=hidden, backend=backend)


def mass_of_call(
    blocks: SequenceBlocks,
    call: AttentionCall,
    lse: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    seen: PairMask | None,
    query_stride: int = 1,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Block masses of a call and their log-sum-exp, of keys of ``key_mask`` or of the pairs of tokens ``seen``.

    With a ``query_stride`` above 1 the log-sum-exp is the one that was given: a sample knows only its own.
    """
    if call.part is not None:
        return _mass_around(blocks, call, call.part, lse, key_mask, query_stride)
    rows, backend = blocks.kernel_rows, call.backend("block_mass")
    case = case_of(call.q, call.k, blocks=(blocks.block_q // query_stride, blocks.block_k))
    if seen is not None and lse is None and choose_block_mass(case, backend).name == "triton":
        # Attention to all that is seen: its kernel knows masks of pairs, that of the masses does not.
        whole = seen.blocks(blocks.layout.seq_len, call.backend("selection"))
        _, lse = block_sparse_attention(call.q, call.k, call.k, whole, rows=rows, scale=call.scale, return_lse=True)
    given: dict[str, Any] = {
        "block_q": blocks.block_q,
        "block_k": blocks.block_k,
        "lse": lse,
        "rows": rows,
        "key_mask": key_mask,
        "seen": seen,
        "scale": call.scale,
        "backend": backend,
    }
    if query_stride > 1:
        return strided_block_mass(call.q, call.k, query_stride=query_stride, **given), lse
    return block_mass(call.q, call.k, **given)


def error_of(blocks: SequenceBlocks, call: AttentionCall, mass: torch.Tensor) -> torch.Tensor:
    """Mass times the distance between a key block's mean value and a query block's mean output, ``[B, H, nq, nk]``.

    The output without a pair of blocks moves, to first order, by its mass times that distance. Mean outputs are
    those of the masses and the mean values.
    """
    values = value_means(blocks, call)
    # Distances of centred vectors: what all values have in common would cost digits.
    values = values - values.mean(2, keepdim=True)
    total = mass.sum(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
    outputs = mass @ values / total
    squares = outputs.square().sum(-1)[..., None] + values.square().sum(-1)[..., None, :]
    return (
        mass
        * torch.baddbmm(squares.flatten(0, 1), outputs.flatten(0, 1), values.flatten(0, 1).transpose(1, 2), alpha=-2.0)
        .view_as(mass)
        .clamp_min(0.0)
        .sqrt()
    )


def pairs_to_choose(
    blocks: SequenceBlocks, key_mask: torch.Tensor | None, hidden: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """bool ``[B|1, H|1, nq, nk]``: pairs of latent blocks to choose from, and those of them that share tokens."""
    allowed = candidates(blocks, key_mask)[..., None, :]
    if blocks.forced_q is not None:
        allowed = allowed & ~blocks.forced_q[..., None]
    if hidden is not None:
        allowed = allowed & ~hidden
    seq_len = blocks.layout.seq_len
    own = own_blocks(blocks.block_q, blocks.block_k, seq_len, seq_len, blocks.device)
    return allowed, own[None, None] & allowed


def _mass_around(
    blocks: SequenceBlocks,
    call: AttentionCall,
    part: RingPart,
    lse: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    query_stride: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`mass_of_call` where processes around a ring share the tokens: keys go round, and masses are gathered.

    The log-sum-exp is of this process' queries.
    """
    sizes: dict[str, Any] = {
        "block_q": blocks.block_q,
        "block_k": blocks.block_k,
        "scale": call.scale,
        "backend": call.backend("block_mass"),
    }
    known = lse
    if known is None:
        for rank, (keys,) in part.around(call.k):
            _, found = block_mass(call.q, keys, key_mask=part.key_mask_of(rank, key_mask), **sizes)
            known = found if known is None else torch.logaddexp(known, found)
    masses: dict[int, torch.Tensor] = {}
    for rank, (keys,) in part.around(call.k):
        given = {"lse": known, "key_mask": part.key_mask_of(rank, key_mask), **sizes}
        if query_stride > 1:
            masses[rank] = strided_block_mass(call.q, keys, query_stride=query_stride, **given)
        else:
            masses[rank], _ = block_mass(call.q, keys, **given)
    own = torch.cat([masses[rank] for rank in range(part.ring.size)], -1)
    # All come to the same plan: budgets are of whole heads.
    return part.ring.gather(own, 2, part.q_counts), known if query_stride == 1 else lse


def recall(mass: torch.Tensor, mask: BlockMask) -> torch.Tensor:
    """Share of the mass ``[B, H, nq, nk]`` that a mask keeps, float32 ``[B, H]``."""
    kept = torch.where(mask.to_dense(), mass, 0).sum((-1, -2))
    return kept / mass.sum((-1, -2)).clamp_min(torch.finfo(mass.dtype).tiny)


def adapted_densities(recall: torch.Tensor, density: float, target: float) -> torch.Tensor:
    """One density per head, ``[B, H]`` from recalls ``[B, H]``, with the mean ``density`` preserved.

    Ties in recall go to the lower head. Above a density of 2/3 the shift is cut, so that no head would have
    to exceed 1.
    """
    heads = recall.shape[-1]
    shift = min(density / 2, 1.0 - density)
    number = (recall > target).sum(-1, keepdim=True).clamp(max=heads // 2)
    order = recall.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(heads, device=order.device).expand_as(order))
    best, worst = rank < number, rank >= heads - number
    return density - shift * best.double() + shift * worst.double()


@dataclass(frozen=True)
class FrozenMass(Select):
    """Keep the key blocks with the largest mean probability, latents ranked in isolation (SparseD).

    Latent columns have a softmax of their own, so that text, reference and padding columns, which are read in
    full anyway, cannot take mass from them (arXiv 2509.24014). With a schedule that plans once after the
    dense phase the mask is frozen to the end.

    Attributes:
        density: kept share of the latent key blocks, in (0, 1].
        block: tokens in a query and in a key block.
    """

    density: float = 0.3
    block: tuple[int, int] = (128, 128)
    has_density: ClassVar[bool] = True
    goes_round: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("density", self.density)
        check_block(self.block)

    def with_density(self, density: float) -> FrozenMass:
        return replace(self, density=density)

    def uses_lse(self, layout: TokenLayout, key_mask: torch.Tensor | None) -> bool:
        """Whether the log-sum-exp of the call's dense attention is that of the latents alone."""
        return key_mask is None and not layout.num_extra

    def choices(self, case: Case, backend: str) -> dict[Operation, Choice]:
        """Block masses."""
        return {"block_mass": choose_block_mass(case, backend)}

    def select(
        self,
        blocks: SequenceBlocks,
        _tables: None,
        call: AttentionCall,
        memory: LayerMemory | None = None,
    ) -> BlockMask:
        """Mask of one call from its queries and keys."""
        lse = visible = None
        if call.seen is None and self.uses_lse(blocks.layout, call.key_mask):
            if memory is not None:
                lse, memory.lse = memory.lse, None  # it was that of this call
        else:
            latents = blocks.latent_tokens.expand(call.q.shape[0], -1)
            visible = (latents if call.key_mask is None else latents & call.key_mask).contiguous()
        seen = None
        if call.pairs is not None:
            pairs = call.pairs & blocks.latent_tokens
            seen = PairMask.of(pairs, blocks.kernel_rows, blocks.block_q, blocks.block_k)
        mass, _ = mass_of_call(blocks, call, lse, visible if seen is None else None, seen)
        # A mean over the visible keys of a block: the last one may be short.
        count = blocks.tokens_k
        if visible is not None:
            slots = gather_mask(visible, blocks.kernel_rows)
            padded = torch.nn.functional.pad(slots, (0, -slots.shape[-1] % blocks.block_k))
            count = padded.unflatten(-1, (-1, blocks.block_k)).sum(-1).clamp_min(1)[..., None, :]
        return keep_best(
            blocks,
            mass / count,
            call.key_mask,
            density=self.density,
            hidden=call.hidden_blocks,
            backend=call.backend("selection"),
        )
