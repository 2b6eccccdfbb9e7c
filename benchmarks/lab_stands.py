"""What stands in for blocks that are left out, in the laboratory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from lab_selections import Found
from lab_sums import (
    Estimate,
    Head,
    both,
    first_order,
    fixed_shares,
    means,
    second_order,
    singles,
    tilted,
    weighted_means,
)

MEAN = 1 / 64
"""Columns of one mean for each block of 64 keys, as a share of all keys."""
NEAR = 3
"""Finer means are read of so many times the blocks that are kept, less these."""


@dataclass(frozen=True)
class Stand:
    """An estimate of the sums of the blocks that are left out.

    Attributes:
        estimate: of all blocks; None leaves them out.
        columns: keys that every query reads more, as a share of all. Products with a D x D state for each block cost as
            its 64 keys do.
        near: of the next best blocks, in place of ``estimate``; four means a block.
    """

    name: str
    estimate: Callable[[Found, Head], Estimate] | None
    columns: float
    near: Callable[[Found, Head], Estimate] | None = None

    def columns_at(self, density: float) -> float:
        """Columns where so many blocks are kept."""
        return self.columns + (0.0 if self.near is None else 3 * MEAN * (NEAR - 1) * density)


def bias_of(found: Found, per_query_block: bool) -> torch.Tensor:
    """Log of what the search found a block's mass to be over what its mean would have."""
    if per_query_block:
        return ((found.mass + 1e-9) / (found.pooled + 1e-9)).log().clamp(0.0, 6.0)
    exact, mean = (torch.where(found.reference, 0.0, x).sum(0) + 1e-7 for x in (found.mass, found.pooled))
    return (exact / mean).log().clamp(0.0, 6.0)


def with_singles(found: Found, head: Head, number: int, per_block: bool) -> Estimate:
    """Means, and the keys that most attention misses as they are: so many of the head, or of each block."""
    chosen = torch.zeros_like(found.missed, dtype=torch.bool)
    if per_block:
        best = found.missed.unflatten(0, (-1, head.block_k)).topk(number, dim=1).indices
        chosen = chosen.unflatten(0, (-1, head.block_k)).scatter(1, best, True).flatten()
    else:
        chosen[found.missed.topk(number).indices] = True
    return both(singles(head, chosen), means(head, head.block_k, chosen))


def biased(found: Found, head: Head, per_query_block: bool) -> Estimate:
    """Means with the search's bias."""
    bias = bias_of(found, per_query_block)
    return weighted_means(head, torch.ones_like(found.missed), bias[head.blocks] if per_query_block else bias)


def block_means(_: Found, head: Head) -> Estimate:
    """One mean a block: today's ``residual``."""
    return means(head, head.block_k)


ALONE = Stand("nothing", None, 0.0)
ONE_MEAN = Stand("mean", block_means, MEAN)
STANDS = (
    ALONE,
    ONE_MEAN,
    Stand("mean, shares of the search", lambda found, head: fixed_shares(head, found.mass[head.blocks]), 0.002),
    Stand("mean, Taylor of each", lambda _, head: first_order(head, shared=False), 1.0),
    Stand("mean, Taylor shared (PISA)", lambda _, head: first_order(head, shared=True), 2 * MEAN),
    Stand("mean, spread, diagonal", lambda _, head: second_order(head, diagonal=True), 2 * MEAN),
    Stand("mean, spread", lambda _, head: second_order(head, diagonal=False), 1.0),
    Stand("Taylor and spread of each", lambda _, head: tilted(head), 1.0),
    Stand("means of 32", lambda _, head: means(head, 32), 2 * MEAN),
    Stand("means of 16", lambda _, head: means(head, 16), 4 * MEAN),
    Stand("means of 8", lambda _, head: means(head, 8), 8 * MEAN),
    Stand("mean, means of 16 near", block_means, MEAN, near=lambda _, head: means(head, 16)),
    Stand("mean by attention", lambda found, head: weighted_means(head, found.missed), MEAN),
    Stand("mean, bias a block", lambda found, head: biased(found, head, False), MEAN),
    Stand("mean, bias a pair", lambda found, head: biased(found, head, True), MEAN),
    Stand("mean, 64 heaviest keys", lambda found, head: with_singles(found, head, 64, False), 2 * MEAN),
    Stand("mean, heaviest of each block", lambda found, head: with_singles(found, head, 1, True), 2 * MEAN),
)


@dataclass(frozen=True, eq=False)
class Carried:
    """What the search's step knows of the output that plans leave out, for every query of the sample.

    Attributes:
        difference: ``[R, n, D]``, of R plans: exact output less that of the plan and a stand-in.
    """

    difference: torch.Tensor


@dataclass(frozen=True)
class Memory:
    """A part of the search's difference, added to the sparse output of later steps.

    Attributes:
        part: of the difference.
        group: neighbouring queries that share a mean of it.
        columns: a tensor like the output is read once more, 0.07 ms of the 11.6 that all keys take, or a part of it.
        lasts: share of the run's steps over which the part falls to nothing; None: it does not fall.
        over: what stands in for the blocks left out, then and now; the difference is what it leaves.
    """

    name: str
    part: float
    group: int
    columns: float
    lasts: float | None = None
    over: Stand = ALONE

    def apply(self, carried: Carried, out: torch.Tensor, age: float) -> torch.Tensor:
        """Sparse outputs ``[R, n, D]`` with what is remembered.

        Args:
            age: of the search, as a share of the run's steps.
        """
        found = carried.difference
        if self.group > 1:
            found = found.unflatten(1, (-1, self.group)).mean(2).repeat_interleave(self.group, 1)
        return out + self.part_at(age) * found

    def part_at(self, age: float) -> float:
        return self.part if self.lasts is None else self.part * max(0.0, 1 - age / self.lasts)


MEMORIES = (
    Memory("mean, carried, less with age", 1.0, 1, MEAN + 0.006, lasts=1.0, over=ONE_MEAN),
    Memory("carried, less with age", 1.0, 1, 0.006, lasts=1.0),
    Memory("carried difference", 1.0, 1, 0.006),
    Memory("three quarters of it", 0.75, 1, 0.006),
    Memory("half the difference", 0.5, 1, 0.006),
    Memory("a quarter of it", 0.25, 1, 0.006),
    Memory("half of 16 queries' mean", 0.5, 16, 0.004),
)
