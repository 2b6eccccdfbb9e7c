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
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    block_q: int
    block_k: int
    blocks: torch.Tensor

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)

    @property
    def num_blocks(self) -> tuple[int, int]:
        return self.q.shape[0] // self.block_q, self.k.shape[0] // self.block_k

    @cached_property
    def largest(self) -> torch.Tensor:
        """``[n, 1]``: each query's largest logit."""
        return (self.q @ self.k.T).amax(1, keepdim=True) * self.scale

    @cached_property
    def terms(self) -> torch.Tensor:
        """``[n, S]``: exponentials of the logits, the largest of a row being one."""
        return torch.addmm(self.largest, self.q, self.k.T, beta=-1, alpha=self.scale).exp_()

    @cached_property
    def exact(self) -> Estimate:
        """The true sums."""
        by_block = self.terms.unflatten(1, (-1, self.block_k))
        values = self.v.unflatten(0, (-1, self.block_k))
        return by_block.sum(-1), torch.bmm(by_block.transpose(0, 1), values)

    @cached_property
    def total(self) -> torch.Tensor:
        """``[n]``: denominators."""
        return self.exact[0].sum(1)

    @cached_property
    def out(self) -> torch.Tensor:
        """``[n, D]``: exact attention."""
        return self.exact[1].sum(0) / self.total[:, None]

    @cached_property
    def mass(self) -> torch.Tensor:
        """``[nq, nk]``: mean share of the attention of a query block that lies in a key block."""
        return (self.exact[0] / self.total[:, None]).unflatten(0, (-1, self.block_q)).mean(1)

    def shares(self, weights: torch.Tensor) -> torch.Tensor:
        """``[nq, nk]``: what :attr:`mass` would be of estimated weights over the true denominators."""
        return (weights / self.total[:, None]).unflatten(0, (-1, self.block_q)).mean(1)

    @cached_property
    def k_blocks(self) -> torch.Tensor:
        return self.k.unflatten(0, (-1, self.block_k))

    @cached_property
    def v_blocks(self) -> torch.Tensor:
        return self.v.unflatten(0, (-1, self.block_k))


def means(head: Head, group: int, chosen: torch.Tensor | None = None) -> Estimate:
    """Means of ``group`` neighbouring keys and values, each with ``+ ln`` of its tokens.

    Args:
        chosen: bool ``[S]``, keys that take no part, since they are read as they are.
    """
    weight = torch.ones_like(head.k[:, :1]) if chosen is None else (~chosen).to(head.k.dtype)[:, None]
    count = weight.unflatten(0, (-1, group)).sum(1)
    k, v = ((x * weight).unflatten(0, (-1, group)).sum(1) / count.clamp_min(1) for x in (head.k, head.v))
    return columns(head, k, v, count[:, 0].log(), head.block_k // group)


def weighted_means(head: Head, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Estimate:
    """Means of each block's keys and values, weighted by ``[S]``.

    Args:
        bias: ``[nq, nk]`` or ``[nk]``, added to the logits beside ``ln n``.
    """
    weight = weight[:, None].clamp_min(1e-12)
    total = weight.unflatten(0, (-1, head.block_k)).sum(1)
    k, v = ((x * weight).unflatten(0, (-1, head.block_k)).sum(1) / total for x in (head.k, head.v))
    return columns(head, k, v, torch.full_like(total[:, 0], head.block_k).log(), 1, bias)


def columns(
    head: Head,
    k: torch.Tensor,
    v: torch.Tensor,
    log_count: torch.Tensor,
    per_block: int,
    bias: torch.Tensor | None = None,
) -> Estimate:
    """Sums of extra key columns ``[nk * per_block, D]``."""
    logits = head.q @ k.T * head.scale + log_count
    if bias is not None:
        logits = logits + (bias if bias.dim() == 1 else bias.repeat_interleave(head.block_q, 0))
    # A mean's logit is at most the largest; a bias may exceed it.
    found = (logits - head.largest).clamp_max(30.0).exp().unflatten(1, (-1, per_block))
    return found.sum(-1), torch.bmm(found.transpose(0, 1), v.unflatten(0, (-1, per_block)))


def singles(head: Head, chosen: torch.Tensor) -> Estimate:
    """The chosen keys, bool ``[S]``, as they are."""
    terms = (head.terms * chosen).unflatten(1, (-1, head.block_k))
    return terms.sum(-1), torch.bmm(terms.transpose(0, 1), head.v_blocks)


def both(one: Estimate, other: Estimate) -> Estimate:
    return one[0] + other[0], one[1] + other[1]


def second_order(head: Head, diagonal: bool) -> Estimate:
    """Block means with the spread of the logits in the normaliser: ``+ 1/2 q' S q``, S the keys' covariance."""
    weights, _ = means(head, head.block_k)
    centred = head.k_blocks - head.k_blocks.mean(1, keepdim=True)
    if diagonal:
        spread = head.q.square() @ centred.square().mean(1).T
    else:
        spread = torch.bmm(head.q.expand(len(centred), -1, -1), centred.transpose(1, 2)).square().mean(2).T
    weights = weights * (spread * (head.scale**2 / 2)).clamp_max(12.0).exp()
    return weights, weights.T[..., None] * head.v_blocks.mean(1)[:, None]


def first_order(head: Head, shared: bool) -> Estimate:
    """Block means with the first-order (Taylor) term of the values: their covariance with the keys, times the query.

    Args:
        shared: one covariance for all blocks (its mean), as PISA sums it, in place of each block's own.
    """
    weights, values = means(head, head.block_k)
    k, v = (x - x.mean(1, keepdim=True) for x in (head.k_blocks, head.v_blocks))
    covariance = torch.bmm(k.transpose(1, 2), v) / head.block_k
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
    return weights, weights.T[..., None] * head.v_blocks.mean(1)[:, None]


def added(estimate: Estimate, share: torch.Tensor) -> Estimate:
    """``[R, n]`` weights and ``[R, n, D]`` values: an estimate summed over blocks with ``share [R, nq, nk]``."""
    nq = share.shape[1]
    weights, values = estimate
    of_rows = share.to(weights.dtype).transpose(0, 1)
    weight = torch.bmm(of_rows, weights.unflatten(0, (nq, -1)).transpose(1, 2))
    value = torch.bmm(of_rows, values.unflatten(1, (nq, -1)).flatten(2).transpose(0, 1))
    return weight.transpose(0, 1).flatten(1), value.transpose(0, 1).unflatten(2, (-1, values.shape[-1])).flatten(1, 2)
