"""The laboratory's selections: what a search knows, how pairs of blocks are scored, and which rows share a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from lab_cost import BLOCK_MASS, CELLS, POOLED
from lab_sums import Estimate, Head, column_terms, group_means, means

STEPS_SERVED = 24
"""Sparse steps of 30 that one search serves, a fifth being dense."""
REFERENCE = 0.1
"""Density of the plan by which a search judges what a key misses."""


@dataclass(frozen=True, eq=False)
class Found:
    """What one search of a head knows; everything is of its own step and, where not said, ``[nq, nk]``.

    Attributes:
        mass: exact.
        pooled: the mass that block means would have, over the exact denominators.
        distance: how far the mean values of key blocks are from the mean outputs of query blocks.
        dropped: root mean square over a query block of what leaving out a key block does to the output, to first order;
            None where nothing asks for these effects, which take most of a search's time.
        replaced: the same of leaving it to its mean.
        reference: bool, the best tenth of each row.
        missed: ``[S]``, attention that each key gets from query blocks outside that plan.
        logits, cells: scores of block means, and of 16-token means.
    """

    mass: torch.Tensor
    pooled: torch.Tensor
    distance: torch.Tensor
    dropped: torch.Tensor | None
    replaced: torch.Tensor | None
    reference: torch.Tensor
    missed: torch.Tensor
    logits: torch.Tensor
    cells: torch.Tensor

    @classmethod
    def of(cls, head: Head, effects: bool) -> Found:
        """Of the blocks of queries at hand.

        Args:
            effects: whether to find ``dropped`` and ``replaced``.
        """
        reference = best_of_rows(head.mass, REFERENCE, own_keys(head))
        share = (head.terms / head.total[:, None]).unflatten(0, (-1, head.block_q)).sum(1)
        return cls(
            mass=head.mass,
            pooled=head.shares(column_terms(head, head.k_means, head.counts.log())),
            distance=distance(head, head.mass),
            dropped=effect(head, None) if effects else None,
            replaced=effect(head, means(head, head.block_k)) if effects else None,
            reference=reference,
            missed=(share.unflatten(1, (-1, head.block_k)) * ~reference[..., None]).sum(0).flatten(),
            logits=pooled_logits(head, head.block_q, head.block_k),
            cells=pooled_logits(head, 16, 16),
        )

    @classmethod
    def joined(cls, parts: list[Found]) -> Found:
        """Of all query blocks, from what was found of a few at a time."""

        def together(name: str, first: torch.Tensor | None) -> torch.Tensor | None:
            if first is None:
                return None
            found = [getattr(part, name) for part in parts]
            return torch.stack(found).sum(0) if name == "missed" else torch.cat(found)

        return cls(**{name: together(name, first) for name, first in vars(parts[0]).items()})


def distance(head: Head, mass: torch.Tensor) -> torch.Tensor:
    """``[nq, nk]``: from the mean output of a query block, by masses and mean values, to a key block's mean value."""
    return torch.cdist(mass @ head.v_means / mass.sum(1, keepdim=True), head.v_means)


def effect(head: Head, estimate: Estimate | None) -> torch.Tensor:
    """``[nq, nk]``: root mean square change of the output, to first order, if one block comes from an estimate."""
    weights, values = head.exact
    if estimate is not None:
        weights, values = weights - estimate[0], values - estimate[1]
    change = (values - weights.T[..., None] * head.out) / head.total[:, None]
    return change.square().sum(-1).T.unflatten(0, (-1, head.block_q)).mean(1).sqrt()


def pooled_logits(head: Head, group_q: int, group_k: int) -> torch.Tensor:
    """``[nq, nk]``: log of the summed exponentials of the logits of cells' means."""
    q = head.q.unflatten(0, (-1, group_q)).mean(1)
    k, count = group_means(head.k, head.shown, group_k)
    logits = (q @ k.T * head.scale).masked_fill(count == 0, -torch.inf).unflatten(0, (-1, head.block_q // group_q))
    return logits.unflatten(2, (-1, head.block_k // group_k)).logsumexp((1, 3))


def spread_logits(head: Head) -> torch.Tensor:
    """``[nq, nk]``: logits of block means, and half the spread of a block's keys along the mean query."""
    q = head.q.unflatten(0, (-1, head.block_q)).mean(1)
    spread = q.square() @ (head.centred(head.k, head.k_means).square().sum(1) / head.counts[:, None]).T
    return q @ head.k_means.T * head.scale + spread * head.scale**2 / 2


def sampled(head: Head, stride: int) -> torch.Tensor:
    """``[nq, nk]``: mass of every n-th query of a block, times the distance."""
    mass = (head.weights / head.total[:, None]).unflatten(0, (-1, head.block_q))[:, ::stride].mean(1)
    return mass * distance(head, mass)


def by_logits(head: Head, logits: torch.Tensor) -> torch.Tensor:
    """``[nq, nk]``: the softmax of pooled logits for a mass, times the distance."""
    mass = logits.softmax(-1)
    return mass * distance(head, mass)


def drifted(found: Found, head: Head, power: float) -> torch.Tensor:
    """``[nq, nk]``: the search's mass, moved by a power of the change of pooled scores since, times the distance."""
    change = pooled_logits(head, head.block_q, head.block_k) - found.logits[head.blocks]
    mass = ((found.mass[head.blocks] + 1e-6).log() + power * change).softmax(-1)
    return mass * distance(head, mass)


@dataclass(frozen=True)
class Selection:
    """Scores, and how a budget is shared out.

    Attributes:
        budget: "row", "head" or "layer": of all rows, heads and layers alike, or wherever the scores are largest. Of a
            call's own scores a budget is shared by the query blocks of the sample.
        plan: dense attentions' worth of planning a call.
        searched: scores of the search's step, ``[nq, nk]`` of all query blocks; None where a call has its own.
        scores: those, of the query blocks at hand.
        effects: whether it asks for a search's effects on the output.
    """

    name: str
    budget: str
    plan: float
    searched: Callable[[Found], torch.Tensor] | None = None
    scores: Callable[[Found, Head], torch.Tensor] | None = None
    effects: bool = False


ONCE = BLOCK_MASS / STEPS_SERVED
SELECTIONS = (
    Selection("mass", "row", ONCE, lambda found: found.mass),
    Selection("mass, head", "head", ONCE, lambda found: found.mass),
    Selection("mass, layer", "layer", ONCE, lambda found: found.mass),
    Selection("ear, row", "row", ONCE, lambda found: found.mass * found.distance),
    Selection("ear, head", "head", ONCE, lambda found: found.mass * found.distance),
    Selection("ear", "layer", ONCE, lambda found: found.mass * found.distance),
    # Another product in the search.
    Selection("change of output, row", "row", 2 * ONCE, lambda found: found.dropped, effects=True),
    Selection("change of output", "layer", 2 * ONCE, lambda found: found.dropped, effects=True),
    Selection("change by the mean", "layer", 2 * ONCE, lambda found: found.replaced, effects=True),
    Selection("mass, each step", "row", BLOCK_MASS, scores=lambda _, head: head.mass),
    Selection("ear, each step", "layer", BLOCK_MASS, scores=lambda _, head: sampled(head, 1)),
    Selection("ear, each step, 8th query", "layer", BLOCK_MASS / 4, scores=lambda _, head: sampled(head, 8)),
    Selection("ear, moved by scores", "layer", ONCE + POOLED, scores=lambda found, head: drifted(found, head, 0.5)),
    Selection("pooled", "row", POOLED, scores=lambda _, head: block_logits(head)),
    Selection("pooled, tau", "layer", POOLED, scores=lambda _, head: block_logits(head).softmax(-1)),
    Selection("pooled ear", "layer", POOLED, scores=lambda _, head: by_logits(head, block_logits(head))),
    Selection("cells of 16", "row", CELLS, scores=lambda _, head: pooled_logits(head, 16, 16)),
    Selection("cells of 16, ear", "layer", CELLS, scores=lambda _, head: by_logits(head, pooled_logits(head, 16, 16))),
    Selection("pooled + spread", "row", POOLED, scores=lambda _, head: spread_logits(head)),
)


def block_logits(head: Head) -> torch.Tensor:
    """``[nq, nk]``: scores of block means."""
    return pooled_logits(head, head.block_q, head.block_k)


def best_of_rows(scores: torch.Tensor, density: float, own: torch.Tensor) -> torch.Tensor:
    """bool ``[..., nq, nk]``: the best of each row, and a query block's own keys."""
    count = max(1, -(-round(density * scores.shape[-1] * 1_000_000) // 1_000_000))
    keep = torch.zeros_like(scores, dtype=torch.bool)
    return keep.scatter_(-1, scores.topk(min(count, scores.shape[-1]), dim=-1).indices, True) | own


def own_keys(head: Head) -> torch.Tensor:
    """bool ``[nq, nk]``: key blocks that hold tokens of a query block."""
    first_q = head.blocks[:, None] * head.block_q
    first_k = torch.arange(head.num_blocks[1], device=first_q.device) * head.block_k
    return (first_k < first_q + head.block_q) & (first_k + head.block_k > first_q)


def keep_by(budget: str, scores: torch.Tensor, density: float, own: torch.Tensor) -> torch.Tensor:
    """bool ``[H, nq, nk]``: as many pairs as :func:`best_of_rows` keeps, where scores ``[H, nq, nk]`` are largest."""
    even = best_of_rows(scores, density, own)
    if budget == "row":
        return even
    groups = scores.flatten(1) if budget == "head" else scores.flatten()[None]
    ranked = torch.where(own, torch.inf, scores).reshape(groups.shape)
    count = int(even.sum()) // len(groups)
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, ranked.topk(count, dim=1).indices, True)
    return keep.view_as(scores)
