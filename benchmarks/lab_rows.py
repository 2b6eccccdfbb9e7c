"""The rows of the laboratory: what a search knows, which blocks are kept, what stands in for the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from lab_cost import BLOCK_MASS, CELLS, POOLED
from lab_sums import (
    Estimate,
    Head,
    added,
    both,
    first_order,
    fixed_shares,
    means,
    second_order,
    singles,
    tilted,
    weighted_means,
)

STEPS_SERVED = 24
"""Sparse steps of 30 that one search serves, a fifth being dense."""


@dataclass(frozen=True, eq=False)
class Found:
    """What one search of a head knows; everything is of its own step.

    Attributes:
        mass: ``[nq, nk]``, exact.
        pooled: ``[nq, nk]``, the mass that block means would have, over the exact denominators.
        missed: ``[S]``, attention that each key gets from query blocks outside the reference plan (a tenth of a row).
        error: ``[nq, nk]``, root mean square over a query block of what leaving a key block to its mean does to the output,
            other blocks being exact; ``dropped`` of what leaving it out does.
        reference: bool ``[nq, nk]``, that plan.
    """

    mass: torch.Tensor
    pooled: torch.Tensor
    missed: torch.Tensor
    error: torch.Tensor
    dropped: torch.Tensor
    reference: torch.Tensor
    rms: torch.Tensor
    distance: torch.Tensor
    logits: torch.Tensor
    cells: torch.Tensor

    @classmethod
    def of(cls, head: Head) -> Found:
        nq, nk = head.num_blocks
        keep = best_of_rows(head.mass, 0.1, own_keys(head))
        left_out = (~keep).to(head.terms.dtype)
        share = (head.terms / head.total[:, None]).unflatten(0, (nq, -1)).sum(1)
        missed = (share.unflatten(1, (nk, -1)) * left_out[..., None]).sum(0).flatten()
        pooled = means(head, head.block_k)
        return cls(
            head.mass,
            head.shares(pooled[0]),
            missed,
            effect(head, pooled),
            effect(head, None),
            keep,
            *extras(head),
            pooled_logits(head, head.block_q, head.block_k),
            pooled_logits(head, 16, 16),
        )


def extras(head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    """``[nq, nk]``: root mean square of a block's mass over its queries, and how far mean values are from mean outputs."""
    rms = (head.exact[0] / head.total[:, None]).square().unflatten(0, (-1, head.block_q)).mean(1).sqrt()
    values = head.v_blocks.mean(1)
    return rms, torch.cdist(head.mass @ values, values)


def rowwise(scores: torch.Tensor, power: float, found: Found) -> torch.Tensor:
    """Scores times a power of what a tenth of each row leaves out."""
    left = torch.where(found.reference, 0.0, scores).sum(-1, keepdim=True)
    return scores * left**power


def effect(head: Head, estimate: Estimate | None) -> torch.Tensor:
    """``[nq, nk]``: root mean square change of the output, to first order, if one block comes from an estimate."""
    weights, values = head.exact
    if estimate is not None:
        weights, values = weights - estimate[0], values - estimate[1]
    change = (values - weights.T[..., None] * head.out) / head.total[:, None]
    return change.square().sum(-1).T.unflatten(0, (-1, head.block_q)).mean(1).sqrt()


@dataclass(frozen=True)
class Selection:
    """Scores, and how a budget is shared out.

    Attributes:
        searched: scores of the search's step, ``[nq, nk]`` of all query blocks; None where a call has its own.
        scores: those, of the query blocks at hand.
        budget: "row", "head" or "layer": of all rows, heads and layers alike, or wherever the scores are largest.
        plan: dense attentions' worth of planning a call.
    """

    name: str
    budget: str
    plan: float
    searched: Callable[[Found], torch.Tensor] | None = None
    scores: Callable[[Found, Head], torch.Tensor] | None = None


def pooled_logits(head: Head, group_q: int, group_k: int) -> torch.Tensor:
    """``[nq, nk]``: log of the summed exponentials of the logits of cells' means."""
    q, k = (x.unflatten(0, (-1, group)).mean(1) for x, group in ((head.q, group_q), (head.k, group_k)))
    logits = (q @ k.T * head.scale).unflatten(0, (-1, head.block_q // group_q))
    return logits.unflatten(2, (-1, head.block_k // group_k)).logsumexp((1, 3))


def spread_logits(head: Head) -> torch.Tensor:
    """``[nq, nk]``: logits of block means, and half the spread of a block's keys along the mean query."""
    q = head.q.unflatten(0, (-1, head.block_q)).mean(1)
    centred = head.k_blocks - head.k_blocks.mean(1, keepdim=True)
    spread = q.square() @ centred.square().mean(1).T
    return q @ head.k_blocks.mean(1).T * head.scale + spread * head.scale**2 / 2


def sampled_error(head: Head, stride: int) -> torch.Tensor:
    """``[nq, nk]``: mass of every n-th query of a block, times the distance of mean values from mean outputs."""
    mass = (head.exact[0] / head.total[:, None]).unflatten(0, (-1, head.block_q))[:, ::stride].mean(1)
    values = head.v_blocks.mean(1)
    return mass * torch.cdist(mass @ values, values)


def pooled_error(head: Head, group_q: int, group_k: int) -> torch.Tensor:
    """``[nq, nk]``: the same with the softmax of pooled logits for a mass."""
    mass = pooled_logits(head, group_q, group_k).softmax(-1)
    values = head.v_blocks.mean(1)
    return mass * torch.cdist(mass @ values, values)


def drifted_error(found: Found, head: Head, power: float, cells: bool) -> torch.Tensor:
    """``[nq, nk]``: the search's mass moved by the change of pooled logits since, times the distance now."""
    if cells:
        change = pooled_logits(head, 16, 16) - found.cells[head.blocks]
    else:
        change = pooled_logits(head, head.block_q, head.block_k) - found.logits[head.blocks]
    mass = ((found.mass[head.blocks] + 1e-6).log() + power * change).softmax(-1)
    values = head.v_blocks.mean(1)
    return mass * torch.cdist(mass @ values, values)


ONCE = BLOCK_MASS / STEPS_SERVED
SELECTIONS = (
    Selection("mass", "row", ONCE, lambda found: found.mass),
    Selection("mass/head", "head", ONCE, lambda found: found.mass),
    Selection("mass/layer", "layer", ONCE, lambda found: found.mass),
    Selection("error/row", "row", ONCE, lambda found: found.dropped),
    Selection("error/layer", "layer", ONCE, lambda found: found.dropped),
    Selection("rms mass/layer", "layer", ONCE, lambda found: found.rms),
    Selection("mass x distance/row", "row", ONCE, lambda found: found.mass * found.distance),
    Selection("mass x distance/head", "head", ONCE, lambda found: found.mass * found.distance),
    Selection("mass x distance/layer", "layer", ONCE, lambda found: found.mass * found.distance),
    Selection("rms x distance/layer", "layer", ONCE, lambda found: found.rms * found.distance),
    Selection("error, row^.5/layer", "layer", ONCE, lambda found: rowwise(found.dropped, 0.5, found)),
    Selection("error, row^1/layer", "layer", ONCE, lambda found: rowwise(found.dropped, 1.0, found)),
    Selection(
        "mass x distance, row^.5/layer", "layer", ONCE, lambda found: rowwise(found.mass * found.distance, 0.5, found)
    ),
    Selection(
        "mass x distance, row^1/layer", "layer", ONCE, lambda found: rowwise(found.mass * found.distance, 1.0, found)
    ),
    Selection("mass, row^.5/layer", "layer", ONCE, lambda found: rowwise(found.mass, 0.5, found)),
    Selection("mass, row^1/layer", "layer", ONCE, lambda found: rowwise(found.mass, 1.0, found)),
    Selection("error of mean/row", "row", ONCE, lambda found: found.error),
    Selection("error of mean/layer", "layer", ONCE, lambda found: found.error),
    Selection("mass, each step", "row", BLOCK_MASS, scores=lambda _, head: head.mass),
    Selection("mass x distance/layer, each step", "layer", BLOCK_MASS, scores=lambda _, head: sampled_error(head, 1)),
    *(
        Selection(
            f"drifted^{power}{', cells' if cells else ''}",
            "layer",
            ONCE + (CELLS if cells else POOLED),
            scores=lambda found, head, power=power, cells=cells: drifted_error(found, head, power, cells),
        )
        for power in (0.0, 0.25, 0.5, 0.75, 1.0)
        for cells in (False, True)
    ),
    Selection("the same of every 8th query", "layer", BLOCK_MASS / 4, scores=lambda _, head: sampled_error(head, 8)),
    Selection("the same of every 16th query", "layer", BLOCK_MASS / 8, scores=lambda _, head: sampled_error(head, 16)),
    Selection(
        "pooled x distance/layer",
        "layer",
        POOLED,
        scores=lambda _, head: pooled_error(head, head.block_q, head.block_k),
    ),
    Selection("cells of 16 x distance/layer", "layer", CELLS, scores=lambda _, head: pooled_error(head, 16, 16)),
    Selection("pooled", "row", POOLED, scores=lambda _, head: pooled_logits(head, head.block_q, head.block_k)),
    Selection("cells of 16", "row", CELLS, scores=lambda _, head: pooled_logits(head, 16, 16)),
    Selection("pooled + spread", "row", POOLED, scores=lambda _, head: spread_logits(head)),
)


@dataclass(frozen=True)
class Stand:
    """What stands in for blocks that are not kept.

    Attributes:
        estimate: of all blocks; None leaves them out.
        columns: keys that every query reads more, as a share of all.
    """

    name: str
    estimate: Callable[[Found, Head], Estimate] | None
    columns: float


def bias_of(found: Found, per_query_block: bool) -> torch.Tensor:
    """Log of what the search found a block's mass to be over what its mean would have."""
    if per_query_block:
        return ((found.mass + 1e-9) / (found.pooled + 1e-9)).log().clamp(0.0, 6.0)
    keep = found.reference
    exact, mean = (torch.where(keep, 0.0, x).sum(0) + 1e-7 for x in (found.mass, found.pooled))
    return (exact / mean).log().clamp(0.0, 6.0)


def heaviest(found: Found, head: Head, number: int, per_block: bool) -> torch.Tensor:
    """bool ``[S]``: keys that get most attention from query blocks that leave theirs out."""
    chosen = torch.zeros_like(found.missed, dtype=torch.bool)
    if not per_block:
        chosen[found.missed.topk(number).indices] = True
        return chosen
    best = found.missed.unflatten(0, (-1, head.block_k)).topk(number, dim=1).indices
    return chosen.unflatten(0, (-1, head.block_k)).scatter(1, best, True).flatten()


def with_singles(found: Found, head: Head, number: int, per_block: bool) -> Estimate:
    chosen = heaviest(found, head, number, per_block)
    return both(singles(head, chosen), means(head, head.block_k, chosen))


# A column of means for each block of 64 keys; products with a D x D state for each block cost as its 64 keys do.
MEAN = 1 / 64
STANDS = (
    Stand("nothing", None, 0.0),
    Stand("mean", lambda _, head: means(head, head.block_k), MEAN),
    Stand("mean, shares of the search", lambda found, head: fixed_shares(head, found.mass[head.blocks]), 0.002),
    Stand("mean, Taylor of each", lambda _, head: first_order(head, shared=False), 1.0),
    Stand("mean, Taylor shared (PISA)", lambda _, head: first_order(head, shared=True), 2 * MEAN),
    Stand("mean, spread, diagonal", lambda _, head: second_order(head, diagonal=True), 2 * MEAN),
    Stand("mean, spread", lambda _, head: second_order(head, diagonal=False), 1.0),
    Stand("Taylor and spread of each", lambda _, head: tilted(head), 1.0),
    Stand("means of 32", lambda _, head: means(head, 32), 2 * MEAN),
    Stand("means of 16", lambda _, head: means(head, 16), 4 * MEAN),
    Stand("means of 8", lambda _, head: means(head, 8), 8 * MEAN),
    Stand("mean by attention", lambda found, head: weighted_means(head, found.missed), MEAN),
    Stand(
        "mean by attention, bias a block",
        lambda found, head: weighted_means(head, found.missed, bias_of(found, False)),
        MEAN,
    ),
    Stand(
        "mean, bias a block",
        lambda found, head: weighted_means(head, torch.ones_like(found.missed), bias_of(found, False)),
        MEAN,
    ),
    Stand(
        "mean, bias a pair",
        lambda found, head: weighted_means(head, torch.ones_like(found.missed), bias_of(found, True)[head.blocks]),
        MEAN,
    ),
    Stand("mean, 64 heaviest keys", lambda found, head: with_singles(found, head, 64, False), 2 * MEAN),
    Stand("mean, heaviest of each block", lambda found, head: with_singles(found, head, 1, True), 2 * MEAN),
    Stand("mean, 3 heaviest of each block", lambda found, head: with_singles(found, head, 3, True), 4 * MEAN),
)


@dataclass(frozen=True, eq=False)
class Carried:
    """What the search's step knows of the output that a plan leaves out, for every query of the sample.

    Attributes:
        difference: ``[R, n, D]``, exact less sparse output.
        share: ``[R, n, 1]``, attention that is left out; ``rest``: ``[R, n, D]``, its mean value.
    """

    difference: torch.Tensor
    share: torch.Tensor
    rest: torch.Tensor

    @classmethod
    def of(cls, head: Head, keep: torch.Tensor) -> Carried:
        """For plans ``[R, nq, nk]``."""
        weight, value = added(head.exact, keep)
        share = (1 - weight / head.total).clamp_min(0.0)[..., None]
        rest = (head.exact[1].sum(0) - value) / (head.total - weight).clamp_min(1e-20)[..., None]
        return cls(head.out - value / weight[..., None], share, torch.where(share > 1e-6, rest, 0.0))

    def by(self, group: int) -> Carried:
        """Means over runs of queries."""

        def mean(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(1, (-1, group)).mean(2).repeat_interleave(group, 1)

        share = mean(self.share)
        return Carried(mean(self.difference), share, mean(self.share * self.rest) / share.clamp_min(1e-9))


@dataclass(frozen=True)
class Memory:
    """A stand-in that adds what the search's step left out; see :class:`Carried`."""

    name: str
    apply: Callable[[Carried, torch.Tensor], torch.Tensor]
    columns: float


# A tensor like the output is read once more, or a part of it: 0.07 ms of the 11.6 that all keys take.
MEMORIES = (
    Memory("carried difference", lambda carried, out: out + carried.difference, 0.006),
    Memory("carried rest", lambda carried, out: torch.lerp(out, carried.rest, carried.share), 0.006),
    Memory("carried difference, 16", lambda carried, out: out + carried.by(16).difference, 0.004),
    Memory("carried rest, 16", lambda c, out: torch.lerp(out, c.by(16).rest, c.by(16).share), 0.004),
    Memory("carried difference, 64", lambda carried, out: out + carried.by(64).difference, 0.004),
    Memory("carried difference, half", lambda carried, out: out + carried.difference / 2, 0.006),
)


def best_of_rows(scores: torch.Tensor, density: float, own: torch.Tensor) -> torch.Tensor:
    """bool ``[..., nq, nk]``: the best of each row, and a query block's own keys."""
    count = max(1, -(-round(density * scores.shape[-1] * 1_000_000) // 1_000_000))
    keep = torch.zeros_like(scores, dtype=torch.bool)
    return keep.scatter_(-1, scores.topk(count, dim=-1).indices, True) | own


def own_keys(head: Head) -> torch.Tensor:
    """bool ``[nq, nk]``: key blocks that hold tokens of a query block."""
    first_q = head.blocks[:, None] * head.block_q
    first_k = torch.arange(head.num_blocks[1], device=first_q.device) * head.block_k
    return (first_k < first_q + head.block_q) & (first_k + head.block_k > first_q)


def keep_by(budget: str, scores: torch.Tensor, density: float, own: torch.Tensor) -> torch.Tensor:
    """bool ``[H, nq, nk]``: as many pairs as :func:`best_of_rows` keeps, where the scores ``[H, nq, nk]`` are largest."""
    even = best_of_rows(scores, density, own)
    if budget == "row":
        return even
    groups = scores.flatten(1) if budget == "head" else scores.flatten()[None]
    ranked = torch.where(own, torch.inf, scores).reshape(groups.shape)
    count = int(even.sum()) // len(groups)
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, ranked.topk(count, dim=1).indices, True)
    return keep.view_as(scores)
