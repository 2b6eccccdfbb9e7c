"""What a plan must compute, with every compensation: in float64, head by head, from what the plan holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dit_accel.plan import AttentionPlan
from dit_accel.recipe import Recipe
from dit_accel.stages.compensate.agent import AgentTokens
from dit_accel.stages.compensate.carried import Carried
from dit_accel.stages.compensate.clipped import ClippedSoftmax
from dit_accel.stages.compensate.linear import LinearBranch
from dit_accel.stages.compensate.none import NoCompensation
from dit_accel.stages.compensate.pooled_mass import PooledMass
from dit_accel.stages.compensate.pyramid import KeyPyramid
from dit_accel.stages.compensate.residual import PooledResidual

# What rounding costs: in float32 a few units of the last place. Otherwise half a step of 1/127 in q and in k, over
# logits of up to some tens: 3%; of 1/16 in e4m3 values: 2% more; of 1/127 in the weights of a block pair, of which the
# largest is up to 20 times a usual one: 5% more; of 1/7 in INT4 values, three times a usual one: 12% more.
REL_NORM = {"Int8": 0.03, "Int8Fp8": 0.05, "Int8Int8": 0.08, "Int8Int4": 0.2}


def assert_attends(recipe: Recipe, plan: AttentionPlan, out: torch.Tensor, *call: Any) -> None:
    """``out`` of :func:`attended`'s arguments is right, as near as the recipe's precision allows."""
    expected = attended(recipe.compensate, plan, *call)
    error = out.double() - expected
    bound = REL_NORM.get(type(recipe.precision).__name__)
    if bound is None:
        assert error.abs().max() <= 4e-6 * expected.abs().max()
    else:
        assert error.norm() <= bound * expected.norm()


def attended(
    compensate: object,
    plan: AttentionPlan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention (B, S, H, D) of a call under a plan; queries that see nothing give 0."""
    batch, length, heads, _ = q.shape
    if plan.keys is not None:
        place = plan.keys.long().transpose(1, 2)[..., None].expand_as(k)
        k, v = k.gather(1, place), v.gather(1, place)
    rows = torch.arange(length) if plan.rows is None else plan.rows.long()
    rows = rows.expand(batch, heads, length)
    tokens = plan.mask.to_tokens().expand(batch, heads, length, length)
    kept = plan.mask.to_dense().expand(batch, heads, -1, -1)
    out = torch.empty(q.shape, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            order = rows[b, h]
            visible = torch.ones(length, dtype=torch.bool) if key_mask is None else key_mask[b, order]
            slots = (x[b, order, h].double() for x in (q, k, v))
            head = _Head(*slots, order, visible, tokens[b, h] & visible, kept[b, h], plan, (b, h))
            out[b, order, h] = _RULES[type(compensate)](compensate, head)
    return out


@dataclass
class _Head:
    """One head in slot order: ``q, k, v [S, D]``, tokens and visible keys ``[S]``, seen pairs, kept blocks."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    tokens: torch.Tensor
    visible: torch.Tensor
    seen: torch.Tensor
    kept: torch.Tensor
    plan: AttentionPlan
    place: tuple[int, int]

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def rows_of(self, pairs: torch.Tensor) -> torch.Tensor:
        """``[nq, ...]`` of query blocks as ``[S, ...]`` of queries."""
        return pairs.repeat_interleave(self.plan.mask.block_q, 0)[: len(self.q)]

    def members(self, first: int, count: int) -> list[int]:
        """The visible keys of a run of slots."""
        return [n for n in range(first, min(first + count, len(self.k))) if self.visible[n]]


def _softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float) -> torch.Tensor:
    weights = (q @ k.T * scale).masked_fill(~seen, -torch.inf).softmax(-1)
    return weights.nan_to_num(0.0) @ v


def _kept_alone(compensate: object, head: _Head) -> torch.Tensor:
    return _softmax(head.q, head.k, head.v, head.seen, head.scale)


def _over_means(head: _Head, runs: list[tuple[int, int, torch.Tensor]]) -> torch.Tensor:
    """One softmax over the seen keys and, for the queries ``[S]`` of each run (first slot, length), its mean."""
    logits = [(head.q @ head.k.T * head.scale).masked_fill(~head.seen, -torch.inf)]
    values = [head.v]
    for first, count, queries in runs:
        members = head.members(first, count)
        if members:
            mean = head.q @ head.k[members].mean(0) * head.scale + math.log(len(members))
            logits.append(mean.masked_fill(~queries, -torch.inf)[:, None])
            values.append(head.v[members].mean(0, keepdim=True))
    return torch.cat(logits, 1).softmax(-1).nan_to_num(0.0) @ torch.cat(values)


def _residual(compensate: PooledResidual, head: _Head) -> torch.Tensor:
    block = head.plan.mask.block_k
    size = compensate.tokens or block
    left_out = head.rows_of(~head.kept)
    runs = [(first, size, left_out[:, first // block]) for first in range(0, left_out.shape[1] * block, size)]
    return _over_means(head, runs)


def _carried(compensate: Carried, head: _Head) -> torch.Tensor:
    """What it adds is the call's, not the plan's: test_carried.py, test_invariants.py."""
    return _residual(PooledResidual(), head) if compensate.means else _kept_alone(compensate, head)


def _pyramid(compensate: object, head: _Head) -> torch.Tensor:
    block = head.plan.mask.block_k
    levels = head.rows_of(head.plan.compensation[head.place])
    # Level 1 is read token by token, whether the selection kept the block or not.
    head.seen = levels.repeat_interleave(block, 1)[:, : len(head.k)].eq(1) & head.visible
    runs = [
        (first, level, levels[:, first // block] == level)
        for level in (2, 4, 8)
        for first in range(0, len(head.k), level)
    ]
    return _over_means(head, runs)


def _pooled_mass(compensate: object, head: _Head) -> torch.Tensor:
    shares, gains = head.plan.compensation
    block = head.plan.mask.block_k
    left_out = ~head.kept if gains is None else ~head.kept & gains[head.place]
    weight = head.rows_of(torch.where(left_out, shares[head.place].double(), 0.0))
    means = torch.zeros(weight.shape[1], head.v.shape[1], dtype=torch.float64)
    for j in range(len(means)):
        members = head.members(j * block, block)
        means[j] = head.v[members].mean(0) if members else 0.0
    rest = 1.0 - weight.sum(-1, keepdim=True)
    return rest * _kept_alone(compensate, head) + weight @ means


def _agents(compensate: AgentTokens, head: _Head) -> torch.Tensor:
    layout = head.plan.compensation.layout
    latent = (head.tokens >= layout.latent_start) & (head.tokens < layout.latent_start + layout.num_latent)
    _, height, width = layout.grid
    tile = compensate.tile if layout.grid[0] > 1 else (1, 2 * compensate.tile[1], compensate.tile[2])
    place = head.tokens[latent] - layout.latent_start
    number = torch.stack(
        [place // (height * width) // tile[0], place // width % height // tile[1], place % width // tile[2]]
    )
    of_tile = number.unique(dim=1, return_inverse=True)[1]
    agents = torch.stack([head.q[latent][of_tile == n].mean(0) for n in range(int(of_tile.max()) + 1)])
    told = _softmax(agents, head.k, head.v, head.visible.expand(len(agents), -1), head.scale)
    out = _softmax(head.q, head.k, head.v, head.visible.expand(len(head.q), -1), head.scale)
    everyone = torch.ones(1, dtype=torch.bool)
    asked = _softmax(head.q[latent], agents, told, everyone, head.scale**compensate.sharpen)
    out[latent] = asked + compensate.shortcut * head.v[latent]
    return out


_RULES: dict[type, Callable[[Any, _Head], torch.Tensor]] = {
    NoCompensation: _kept_alone,
    Carried: _carried,
    LinearBranch: _kept_alone,  # an untrained branch adds nothing
    ClippedSoftmax: _kept_alone,  # without its layer nothing is clipped (tests/training/test_clipped_softmax.py)
    PooledResidual: _residual,
    KeyPyramid: _pyramid,
    PooledMass: _pooled_mass,
    AgentTokens: _agents,
}
