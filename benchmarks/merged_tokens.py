"""Tokens merged by similarity as ToMe does (arXiv 2210.09461), and attention through agents."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dit_accel.layout import Grid


@dataclass(frozen=True, eq=False)
class Merging:
    """Which merged token each token belongs to.

    Attributes:
        number: int64 ``[B, H, S]``.
        count: merged tokens.
    """

    number: torch.Tensor
    count: int

    def means(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, count, D]`` of ``[B, H, S, D]``."""
        total = x.new_zeros(*x.shape[:2], self.count, x.shape[-1])
        total = total.scatter_add(2, self.number[..., None].expand_as(x), x)
        return total / self.sizes(x)[..., None]

    def sizes(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens in each merged one, ``[B, H, count]`` in the dtype of ``x``."""
        ones = torch.ones_like(self.number, dtype=x.dtype)
        return x.new_zeros(*self.number.shape[:2], self.count).scatter_add(2, self.number, ones)


def merging(x: torch.Tensor, grid: Grid, cell: tuple[int, int, int], share: float) -> Merging:
    """ToMe's matching of ``x [B, H, S, D]`` by cosine: the first token of each cell stays, and ``share`` of all tokens,
    or all others if that is more, go to the most alike of those that stay."""
    f, h, w = (torch.arange(size) % step for size, step in zip(grid, cell, strict=True))
    stays = ((f == 0)[:, None, None] & (h == 0)[:, None] & (w == 0)).flatten()
    to, of = stays.nonzero()[:, 0], (~stays).nonzero()[:, 0]
    unit = torch.nn.functional.normalize(x, dim=-1)
    alike, best = (unit[:, :, of] @ unit[:, :, to].transpose(-1, -2)).max(-1)
    merged = min(len(of), round(share * x.shape[2]))
    order = alike.argsort(-1, descending=True)
    number = torch.empty(x.shape[:3], dtype=torch.int64)
    number[:, :, to] = torch.arange(len(to))
    own = best.scatter(
        2, order[..., merged:], (len(to) + torch.arange(len(of) - merged)).expand_as(order[..., merged:])
    )
    number[:, :, of] = own
    return Merging(number, x.shape[2] - merged)


def through(
    q: torch.Tensor, agents: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, sharpen: float
) -> torch.Tensor:
    """Two attentions, keys to agents and agents to queries."""
    told = (scale * agents @ k.transpose(-1, -2)).softmax(-1) @ v
    return (scale**sharpen * q @ agents.transpose(-1, -2)).softmax(-1) @ told
