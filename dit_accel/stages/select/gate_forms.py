"""What a learned selection computes in one layer: four forms, each added to the logits of mean queries and keys, to
which each adds nothing before it is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ...call import AttentionCall
from ...kernels.common.tokens import gather_mask, gather_rows
from ...plan import SequenceBlocks
from ..learned_layer import LearnedLayer
from .means import key_means, of_all_keys, own_key_mask, query_means, value_means

ROTARY_BASE = 100.0
"""Of the rotary positions of blocks: the longest period is some 600 tokens of a grid."""
WAVES = 3
"""Cosines along each axis of the grid that a low-rank form knows blocks by, the constant one included."""


@dataclass(frozen=True, eq=False)
class BlockPlaces:
    """Where the blocks of a sequence lie on the grid, frame, row and column of their means: float32 ``[H|1, n, 3]``."""

    q: torch.Tensor
    k: torch.Tensor


class GateForm(LearnedLayer):
    """The gate of one attention layer.

    Args:
        heads, head_dim: of the layer.
        rank: how much it learns; a form may need none.

    Attributes:
        goes_round: what it reads are numbers of blocks, which processes around a ring can gather.
    """

    goes_round: ClassVar[bool] = True

    def __init__(self, heads: int, head_dim: int, rank: int) -> None:  # noqa: ARG002
        super().__init__()

    def per_head(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.named_parameters())

    @staticmethod
    def gathered(blocks: SequenceBlocks, places: BlockPlaces, call: AttentionCall) -> tuple[torch.Tensor, ...]:
        """What the gate reads of a call, without a gradient; the first two are mean queries ``[B, H, nq, D]`` and mean
        keys ``[B, H, nk, D]``, float32. Keys that are hidden do not count, and a block of them has zeros."""
        raise NotImplementedError

    def forward(self, *gathered: torch.Tensor, scale: float) -> torch.Tensor:
        """Scores, float32 ``[B, H, nq, nk]``.

        Args:
            gathered: of :meth:`gathered`.
            scale: of the attention's logits.
        """
        q_mean, k_mean, *more = gathered
        plain: torch.Tensor = scale * q_mean @ k_mean.transpose(-1, -2)
        return plain + self.added(q_mean, k_mean, *more, scale=scale)

    def added(self, *gathered: torch.Tensor, scale: float) -> torch.Tensor:
        """What was learned, ``[B, H, nq, nk]`` or to broadcast."""
        raise NotImplementedError


class PooledGate(GateForm):
    """``R(p) W_q mean(q) . R(p') W_k [mean(k), max(k), min(k)]`` (SeerAttention, arXiv 2410.13276).

    ``R`` is a rotation by where the blocks lie. Parameters ``project_q [H, D, r]``, zero, and
    ``project_k [H, 3 D, r]``.
    """

    def __init__(self, heads: int, head_dim: int, rank: int) -> None:
        super().__init__(heads, head_dim, rank)
        self.project_q = nn.Parameter(torch.zeros(heads, head_dim, rank))
        self.project_k = nn.Parameter(_random(heads, 3 * head_dim, rank))

    @staticmethod
    def gathered(blocks: SequenceBlocks, places: BlockPlaces, call: AttentionCall) -> tuple[torch.Tensor, ...]:
        q_mean, k_mean = query_means(blocks, call), key_means(blocks, call)
        rows = blocks.kernel_rows if call.part is None else None
        keys, seen = _cut(call.k, rows, blocks.block_k, own_key_mask(call))
        ends = []
        for worst, best in ((-torch.inf, torch.amax), (torch.inf, torch.amin)):
            found = best(keys.masked_fill(~seen[..., None], worst), dim=3).float()
            ends.append(found.masked_fill(found.isinf(), 0.0))
        return q_mean, k_mean, of_all_keys(torch.cat(ends, -1), call), places.q, places.k

    def added(self, *gathered: torch.Tensor, scale: float) -> torch.Tensor:  # noqa: ARG002
        q_mean, k_mean, ends, place_q, place_k = gathered
        asked = _rotated(q_mean @ self.project_q.float(), place_q)
        told = _rotated(torch.cat([k_mean, ends], -1) @ self.project_k.float(), place_k)
        return asked @ told.transpose(-1, -2)


class LowRankGate(GateForm):
    """A query block asks a few mixtures of keys, each of which knows blocks to read (Sparsifiner, arXiv 2303.13755).

    ``softmax_r(scale mean(q) . sum_j D_rj mean(k_j)) U_rj``. The paper's ``D`` and ``U`` have a column for each token
    of one size of image. Here they are sums of cosines of where a block lies on the grid, so that they serve every
    size: parameters ``down`` and ``up [H, r, 27]``, the second zero.
    """

    def __init__(self, heads: int, head_dim: int, rank: int) -> None:
        super().__init__(heads, head_dim, rank)
        self.down = nn.Parameter(_random(heads, rank, WAVES**3))
        self.up = nn.Parameter(torch.zeros(heads, rank, WAVES**3))

    @staticmethod
    def gathered(blocks: SequenceBlocks, places: BlockPlaces, call: AttentionCall) -> tuple[torch.Tensor, ...]:
        last = torch.tensor([max(1, size - 1) for size in blocks.layout.grid], device=places.k.device)
        numbers = torch.arange(WAVES, device=places.k.device)
        frame, row, column = (math.pi * (places.k / last)[..., None] * numbers).cos().unbind(-2)
        waves = frame[..., :, None, None] * row[..., None, :, None] * column[..., None, None, :]
        return (query_means(blocks, call), key_means(blocks, call), waves.flatten(-3))

    def added(self, *gathered: torch.Tensor, scale: float) -> torch.Tensor:
        q_mean, k_mean, waves = gathered
        mixtures = self.down.float() @ waves.transpose(-1, -2) @ k_mean / k_mean.shape[2]
        asked = (scale * q_mean @ mixtures.transpose(-1, -2)).softmax(-1)
        return asked @ (self.up.float() @ waves.transpose(-1, -2))


class LinearGate(GateForm):
    """The mass of a pair of blocks by linear attention (SEA, arXiv 2310.01777).

    ``gain log(mean phi_q(q) . mean phi_k(k))`` with ``phi(x) = softmax(x W)``, means over the tokens of a block, as the
    states of a linear branch are. In place of the paper's network that decodes a map of a fixed width each block has
    its own entry. Parameters ``features_q`` and ``features_k [H, D, r]``, and ``gain [H]``, zero.
    """

    goes_round: ClassVar[bool] = False

    def __init__(self, heads: int, head_dim: int, rank: int) -> None:
        super().__init__(heads, head_dim, rank)
        self.features_q = nn.Parameter(_random(heads, head_dim, rank))
        # Of one beginning: alike queries and keys then have alike features.
        self.features_k = nn.Parameter(_random(heads, head_dim, rank))
        self.gain = nn.Parameter(torch.zeros(heads))

    @staticmethod
    def gathered(blocks: SequenceBlocks, places: BlockPlaces, call: AttentionCall) -> tuple[torch.Tensor, ...]:  # noqa: ARG004
        queries = _cut(call.q, blocks.kernel_rows, blocks.block_q, None)
        means = query_means(blocks, call), key_means(blocks, call)
        return (*means, *queries, *_cut(call.k, blocks.kernel_rows, blocks.block_k, call.key_mask))

    def added(self, *gathered: torch.Tensor, scale: float) -> torch.Tensor:  # noqa: ARG002
        queries, of_q, keys, of_k = gathered[2:]
        told = _state(queries, of_q, self.features_q) @ _state(keys, of_k, self.features_k).transpose(-1, -2)
        return self.gain.float()[:, None, None] * told.clamp_min(1e-8).log()


class ValueGate(GateForm):
    """Key blocks by what their values hold, whoever asks (dynamic mask attention, arXiv 2508.02124).

    ``exp(decay softplus(mean(v) . w)) - 1``, the paper's bias of a key, here of a block's mean value. Parameters
    ``weight [H, D]`` and ``decay [H]``, zero.
    """

    def __init__(self, heads: int, head_dim: int, rank: int) -> None:
        super().__init__(heads, head_dim, rank)
        self.weight = nn.Parameter(_random(heads, head_dim, 1)[..., 0])
        self.decay = nn.Parameter(torch.zeros(heads))

    @staticmethod
    def gathered(blocks: SequenceBlocks, places: BlockPlaces, call: AttentionCall) -> tuple[torch.Tensor, ...]:  # noqa: ARG004
        return (query_means(blocks, call), key_means(blocks, call), value_means(blocks, call))

    def added(self, *gathered: torch.Tensor, scale: float) -> torch.Tensor:  # noqa: ARG002
        heard = F.softplus((gathered[2] * self.weight.float()[:, None]).sum(-1))
        return torch.expm1(self.decay.float()[:, None] * heard)[..., None, :]


FORMS: dict[str, type[GateForm]] = {
    "pooled": PooledGate,
    "low_rank": LowRankGate,
    "linear": LinearGate,
    "values": ValueGate,
}


def _random(*shape: int) -> torch.Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return drawn / shape[-2] ** 0.5


def _cut(
    x: torch.Tensor, rows: torch.Tensor | None, block: int, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens by blocks ``[B, H, n, block, D]``, and which of them are seen ``[B|1, H|1, n, block]``."""
    tokens = gather_rows(x, rows)
    short = -tokens.shape[2] % block
    seen = torch.ones(1, 1, tokens.shape[2], dtype=torch.bool, device=x.device)
    if mask is not None:
        seen = gather_mask(mask, rows)
    return (
        F.pad(tokens, (0, 0, 0, short)).unflatten(2, (-1, block)),
        F.pad(seen, (0, short), value=False).unflatten(2, (-1, block)),
    )


def _state(tokens: torch.Tensor, seen: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Mean features of each block ``[B, H, n, r]``; zeros where none is seen."""
    told = (tokens.float() @ features.float()[:, None]).softmax(-1) * seen[..., None]
    return told.sum(3) / seen.sum(-1, keepdim=True).clamp(min=1)


def _rotated(x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Pairs of features turned by the place on one axis each: ``x [B, H, n, r]``, ``place [..., n, 3]``."""
    pairs = x.shape[-1] // 6
    rates = ROTARY_BASE ** (-torch.arange(pairs, device=x.device) / pairs)
    angle = (place[..., None] * rates).flatten(-2)
    first, second = x.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
