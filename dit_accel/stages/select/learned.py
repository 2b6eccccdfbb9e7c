"""Key blocks by a learned gate: SeerAttention (arXiv 2410.13276)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ...call import AttentionCall
from ...kernels import BlockMask
from ...kernels.common.tokens import gather_mask, gather_rows
from ...kernels.selection.api import pool_blocks
from ...plan import LayerMemory, SequenceBlocks
from ..learned_layer import LearnedLayer
from .pooled import candidates, keep_best
from .protocol import (
    WHOLE_BLOCK_SIZES,
    HeadDensities,
    Select,
    check_block,
    check_head_densities,
    check_share,
    density_of_layer,
    shares_per_head,
)

ROTARY_BASE = 100.0
"""Of the rotary positions of blocks: the longest period is some 600 tokens of a grid."""


@dataclass(frozen=True, eq=False)
class BlockPlaces:
    """Where the blocks of a sequence lie on the grid, frame, row and column of their means: float32 ``[H|1, n, 3]``."""

    q: torch.Tensor
    k: torch.Tensor


@dataclass(frozen=True)
class Learned(Select):
    """Score a pair of blocks by a gate that was trained to tell the exact attention mass (SeerAttention).

    ``score = scale * mean(q) . mean(k) + R(p) W_q mean(q) . R(p') W_k [mean(k), max(k), min(k)]`` for each head, with
    ``W_q`` and ``W_k`` of a low rank, and ``R`` a rotation by where the blocks lie on the grid. ``W_q`` is zero at the
    start: an untrained gate chooses as :class:`~dit_accel.stages.select.pooled.Pooled` does. Train it with the
    objective "gate", which leaves the model as it is.

    Attributes:
        density: kept share of the latent key blocks, in (0, 1].
        rank: of the projections, a multiple of 6 for the three axes of the grid.
        block: tokens in a query and in a key block.
        head_densities: see :class:`~dit_accel.stages.select.pooled.Pooled`.
    """

    density: float | None = 0.1
    rank: int = 24
    block: tuple[int, int] = (128, 64)
    head_densities: HeadDensities = ()
    has_density: ClassVar[bool] = True
    has_head_densities: ClassVar[bool] = True
    is_learned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.density is None:
            raise ValueError("select.density must lie in (0, 1], got None.")
        check_share("density", self.density)
        check_block(self.block, WHOLE_BLOCK_SIZES)
        check_head_densities(self.head_densities)
        if self.rank < 6 or self.rank % 6:
            raise ValueError(f"select.rank must be a multiple of 6, got {self.rank}.")

    def with_density(self, density: float) -> Learned:
        return replace(self, density=density, head_densities=())

    def of_layer(self, layer: int) -> Learned:
        densities = density_of_layer(self.head_densities, layer)
        return self if densities is self.head_densities else replace(self, head_densities=densities)

    def prepare(self, blocks: SequenceBlocks) -> BlockPlaces:
        return BlockPlaces(_places(blocks, blocks.block_q), _places(blocks, blocks.block_k))

    def build(self, heads: int, head_dim: int) -> LearnedGateScores:
        """The gate of one layer, which adds nothing yet."""
        return LearnedGateScores(heads, head_dim, self.rank)

    def select(
        self,
        blocks: SequenceBlocks,
        tables: BlockPlaces,
        call: AttentionCall,
        _memory: LayerMemory | None = None,
    ) -> BlockMask:
        """Mask of one call from its queries and keys."""
        scores = self.scores(blocks, tables, call)
        return keep_best(
            blocks,
            scores,
            call.key_mask,
            density=shares_per_head(self.head_densities, self.density, scores.shape[1], scores.device, call.heads),
            hidden=call.hidden_blocks,
            backend=call.backend("selection"),
        )

    def scores(self, blocks: SequenceBlocks, tables: BlockPlaces, call: AttentionCall) -> torch.Tensor:
        """Logits, float32 ``[B, H, nq, nk]``, with a gradient for the gate alone."""
        if call.router is None:
            raise RuntimeError("Learned has no gate here: it belongs to the layers of a patched model.")
        with torch.no_grad():
            q_mean, k_parts = pooled_parts(blocks, call)
        return call.router(q_mean, k_parts, tables.q, tables.k, call.scale)

    def chosen_by(
        self, blocks: SequenceBlocks, scores: torch.Tensor, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What one call with these mean logits would keep."""
        return keep_best(blocks, scores, None, density=self.density, hidden=hidden).to_dense()


class LearnedGateScores(LearnedLayer):
    """The gate of one attention layer: parameters ``project_q [H, D, r]``, zero, and ``project_k [H, 3 D, r]``."""

    def __init__(self, heads: int, head_dim: int, rank: int) -> None:
        super().__init__()
        self.project_q = nn.Parameter(torch.zeros(heads, head_dim, rank))
        generator = torch.Generator().manual_seed(0)
        first = torch.randn(heads, 3 * head_dim, rank, generator=generator) / (3 * head_dim) ** 0.5
        self.project_k = nn.Parameter(first)

    def forward(
        self, q_mean: torch.Tensor, k_parts: torch.Tensor, place_q: torch.Tensor, place_k: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Scores ``[B, H, nq, nk]``.

        Args:
            q_mean: mean queries, float32 ``[B, H, nq, D]``.
            k_parts: means, largest and smallest keys, float32 ``[B, H, nk, 3 D]``.
            place_q, place_k: see :class:`BlockPlaces`.
            scale: of the attention's logits.
        """
        plain = scale * q_mean @ k_parts[..., : q_mean.shape[-1]].transpose(-1, -2)
        asked = _rotated(q_mean @ self.project_q.float(), place_q)
        told = _rotated(k_parts @ self.project_k.float(), place_k)
        scores: torch.Tensor = plain + asked @ told.transpose(-1, -2)
        return scores


def pooled_parts(blocks: SequenceBlocks, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean queries ``[B, H, nq, D]``, and of keys means, largest and smallest ``[B, H, nk, 3 D]``, float32.

    Keys that are hidden do not count, and a block of them has zeros.
    """
    backend, rows = call.backend("selection"), blocks.kernel_rows
    q_mean = pool_blocks(call.q, blocks.block_q, rows=rows, backend=backend)
    k_mean = pool_blocks(call.k, blocks.block_k, rows=rows, key_mask=call.key_mask, backend=backend)
    keys = gather_rows(call.k, rows)
    short = -keys.shape[2] % blocks.block_k
    seen = None if call.key_mask is None else gather_mask(call.key_mask, rows)
    ends = []
    for worst, best in ((-torch.inf, torch.amax), (torch.inf, torch.amin)):
        values = keys if seen is None else keys.masked_fill(~seen[..., None], worst)
        cut = F.pad(values, (0, 0, 0, short), value=worst).unflatten(2, (-1, blocks.block_k))
        found = best(cut, dim=3).float()
        ends.append(found.masked_fill(found.isinf(), 0.0))
    return q_mean, torch.cat([k_mean, *ends], -1)


def gate_divergence(
    blocks: SequenceBlocks, tables: BlockPlaces, select: Learned, call: AttentionCall, mass: torch.Tensor
) -> torch.Tensor:
    """Kullback-Leibler divergence of the gate's softmax from the exact mass, over the blocks that it may choose among;
    the mean over rows that choose, a 0-d tensor.

    Args:
        mass: exact attention mass of each block pair, ``[B, H, nq, nk]``.
    """
    scores = select.scores(blocks, tables, call)
    open_k = candidates(blocks, call.key_mask)[..., None, :]
    wanted = mass.float().masked_fill(~open_k, 0.0)
    wanted = wanted / wanted.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    told = scores.masked_fill(~open_k, torch.finfo(torch.float32).min).log_softmax(-1)
    rows = (torch.xlogy(wanted, wanted) - wanted * told).sum(-1)
    if blocks.forced_q is None:
        return rows.mean()
    choosing = (~blocks.forced_q).expand(rows.shape)
    return (rows * choosing).sum() / choosing.sum().clamp(min=1)


def _places(blocks: SequenceBlocks, block: int) -> torch.Tensor:
    latent = blocks.latent_of_slot >= 0
    short = -latent.shape[-1] % block
    count = F.pad(latent, (0, short)).unflatten(-1, (-1, block)).sum(-1).clamp(min=1)
    means = []
    for axis in blocks.coordinates:
        total = F.pad(axis * latent, (0, short)).unflatten(-1, (-1, block)).sum(-1)
        means.append(total / count)
    found = torch.stack(means, -1)
    return found.reshape((1,) * (3 - found.dim()) + tuple(found.shape)).float()


def _rotated(x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Pairs of features turned by the place on one axis each: ``x [B, H, n, r]``, ``place [..., n, 3]``."""
    pairs = x.shape[-1] // 6
    rates = ROTARY_BASE ** (-torch.arange(pairs, device=x.device) / pairs)
    angle = (place[..., None] * rates).flatten(-2)
    first, second = x.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
