"""Exact and estimated sums of the softmax over blocks of keys, for one attention head.

Every estimate is a pair: weights ``[n, nk]`` and weighted values ``[nk, n, D]``, for each query and key block, both
over the exponential of the query's largest logit. A method keeps some blocks exactly and takes others from an
estimate, so that its output is a quotient of sums over blocks, whatever it keeps. Hundreds of rows are cheap that way.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

Estimate = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Head:
    """One head of a call in the order of its blocks; k and v are ``[S, D]``, S a multiple of the block size.

    Attributes:
        q: queries of some blocks, ``[n, D]``.
        blocks: which, int ``[nq]``.
        length: tokens among the S keys; zeros behind them fill the last block, and nothing reads them. None: all.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    block_q: int
    block_k: int
    blocks: torch.Tensor
    length: int | None = None

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)

    @property
    def num_blocks(self) -> tuple[int, int]:
        return self.q.shape[0] // self.block_q, self.k.shape[0] // self.block_k

    @cached_property
    def shown(self) -> torch.Tensor:
        """``[S]``: one for a token, zero for what fills the last block."""
        found = torch.ones_like(self.k[:, 0])
        if self.length is not None:
            found[self.length :] = 0
        return found

    @cached_property
    def largest(self) -> torch.Tensor:
        """``[n, 1]``: each query's largest logit."""
        return (self.q @ self.k[: self.length].T).amax(1, keepdim=True) * self.scale

    @cached_property
    def terms(self) -> torch.Tensor:
        """``[n, S]``: exponentials of the logits, the largest of a row being one; zero where no token is."""
        found = torch.addmm(self.largest, self.q, self.k.T, beta=-1, alpha=self.scale).exp_()
        if self.length is not None:
            found[:, self.length :] = 0
        return found

    @cached_property
    def weights(self) -> torch.Tensor:
        """``[n, nk]``: the true sums of the terms."""
        return self.terms.unflatten(1, (-1, self.block_k)).sum(-1)

    @cached_property
    def exact(self) -> Estimate:
        """The true sums."""
        by_block = self.terms.unflatten(1, (-1, self.block_k))
        return self.weights, torch.bmm(by_block.transpose(0, 1), self.v_blocks)

    @cached_property
    def total(self) -> torch.Tensor:
        """``[n]``: denominators."""
        return self.weights.sum(1)

    @cached_property
    def out(self) -> torch.Tensor:
        """``[n, D]``: exact attention."""
        return self.exact[1].sum(0) / self.total[:, None]

    @cached_property
    def mass(self) -> torch.Tensor:
        """``[nq, nk]``: mean share of the attention of a query block that lies in a key block."""
        return self.shares(self.weights)

    def shares(self, weights: torch.Tensor) -> torch.Tensor:
        """``[nq, nk]``: what :attr:`mass` would be of estimated weights over the true denominators."""
        return (weights / self.total[:, None]).unflatten(0, (-1, self.block_q)).mean(1)

    @cached_property
    def v_blocks(self) -> torch.Tensor:
        return self.v.unflatten(0, (-1, self.block_k))

    @cached_property
    def k_means(self) -> torch.Tensor:
        """``[nk, D]``: of each block."""
        return group_means(self.k, self.shown, self.block_k)[0]

    @cached_property
    def v_means(self) -> torch.Tensor:
        """``[nk, D]``: of each block."""
        return group_means(self.v, self.shown, self.block_k)[0]

    @cached_property
    def counts(self) -> torch.Tensor:
        """``[nk]``: tokens of each block."""
        return self.shown.unflatten(0, (-1, self.block_k)).sum(1)

    def centred(self, x: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        """``[nk, block_k, D]``: keys or values less their block's mean, zero where no token is."""
        found = x.unflatten(0, (-1, self.block_k)) - means[:, None]
        return found * self.shown.unflatten(0, (-1, self.block_k))[..., None]


def group_means(x: torch.Tensor, weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted means of ``group`` neighbouring rows of ``[S, D]``, and their total weights ``[S / group]``."""
    total = weight.unflatten(0, (-1, group)).sum(1)
    return (x * weight[:, None]).unflatten(0, (-1, group)).sum(1) / total.clamp_min(1e-12)[:, None], total


def means(head: Head, group: int, chosen: torch.Tensor | None = None) -> Estimate:
    """Means of ``group`` neighbouring keys and values, each with ``+ ln`` of its tokens.

    Args:
        chosen: bool ``[S]``, keys that take no part, since they are read as they are.
    """
    weight = head.shown if chosen is None else head.shown * ~chosen
    (k, count), (v, _) = (group_means(x, weight, group) for x in (head.k, head.v))
    return columns(head, k, v, count.log(), head.block_k // group)


def weighted_means(head: Head, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Estimate:
    """Means of each block's keys and values, weighted by ``[S]``.

    Args:
        bias: ``[nq, nk]`` or ``[nk]``, added to the logits beside ``ln n``.
    """
    weight = weight.clamp_min(1e-12) * head.shown
    k, v = (group_means(x, weight, head.block_k)[0] for x in (head.k, head.v))
    return columns(head, k, v, head.counts.log(), 1, bias)


def columns(
    head: Head,
    k: torch.Tensor,
    v: torch.Tensor,
    log_count: torch.Tensor,
    per_block: int,
    bias: torch.Tensor | None = None,
) -> Estimate:
    """Sums of extra key columns ``[nk * per_block, D]``."""
    found = column_terms(head, k, log_count, bias).unflatten(1, (-1, per_block))
    return found.sum(-1), torch.bmm(found.transpose(0, 1), v.unflatten(0, (-1, per_block)))


def column_terms(
    head: Head, k: torch.Tensor, log_count: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``[n, columns]``: exponentials of extra keys' logits, each with the log of the tokens that it stands for."""
    logits = head.q @ k.T * head.scale + log_count
    if bias is not None:
        logits = logits + (bias if bias.dim() == 1 else bias.repeat_interleave(head.block_q, 0))
    # A mean's logit is at most the largest; a bias may exceed it.
    return (logits - head.largest).clamp_max(30.0).exp()


def singles(head: Head, chosen: torch.Tensor) -> Estimate:
    """The chosen keys, bool ``[S]``, as they are."""
    terms = (head.terms * chosen).unflatten(1, (-1, head.block_k))
    return terms.sum(-1), torch.bmm(terms.transpose(0, 1), head.v_blocks)


def both(one: Estimate, other: Estimate) -> Estimate:
    return one[0] + other[0], one[1] + other[1]


def second_order(head: Head, diagonal: bool) -> Estimate:
    """Block means with the spread of the logits in the normaliser: ``+ 1/2 q' S q``, S the keys' covariance."""
    weights = column_terms(head, head.k_means, head.counts.log())
    centred = head.centred(head.k, head.k_means)
    if diagonal:
        spread = head.q.square() @ (centred.square().sum(1) / head.counts[:, None]).T
    else:
        along = torch.bmm(head.q.expand(len(centred), -1, -1), centred.transpose(1, 2))
        spread = along.square_().sum(2).T / head.counts
    weights = weights * (spread * (head.scale**2 / 2)).clamp_max(12.0).exp()
    return weights, weights.T[..., None] * head.v_means[:, None]


def first_order(head: Head, shared: bool) -> Estimate:
    """Block means with the first-order (Taylor) term of the values: their covariance with the keys, times the query.

    Args:
        shared: one covariance for all blocks (its mean), as PISA sums it, in place of each block's own.
    """
    weights, values = means(head, head.block_k)
    k, v = head.centred(head.k, head.k_means), head.centred(head.v, head.v_means)
    covariance = torch.bmm(k.transpose(1, 2), v) / head.counts[:, None, None]
    if shared:
        covariance = covariance.mean(0, keepdim=True).expand_as(covariance)
    change = torch.bmm(head.q.expand(len(covariance), -1, -1), covariance) * head.scale
    return weights, values + weights.T[..., None] * change


def tilted(head: Head) -> Estimate:
    """Second-order normaliser and first-order values together: exact for normally distributed keys."""
    weights, _ = second_order(head, diagonal=False)
    plain, values = first_order(head, shared=False)
    return weights, values * (weights / plain.clamp_min(1e-30)).T[..., None]


def fixed_shares(head: Head, mass: torch.Tensor) -> Estimate:
    """Block means of the values, weighted by ``mass`` ``[nq, nk]`` of a search: every query of a block alike."""
    weights = mass.repeat_interleave(head.block_q, 0) * head.total[:, None]
    return weights, weights.T[..., None] * head.v_means[:, None]


def added(estimate: Estimate, share: torch.Tensor) -> Estimate:
    """``[R, n]`` weights and ``[R, n, D]`` values: an estimate summed over blocks with ``share [R, nq, nk]``."""
    nq = share.shape[1]
    weights, values = estimate
    of_rows = share.to(weights.dtype).transpose(0, 1)
    weight = torch.bmm(of_rows, weights.unflatten(0, (nq, -1)).transpose(1, 2))
    value = torch.bmm(of_rows, values.unflatten(1, (nq, -1)).flatten(2).transpose(0, 1))
    return weight.transpose(0, 1).flatten(1), value.transpose(0, 1).unflatten(2, (-1, values.shape[-1])).flatten(1, 2)
