"""Tokens for heads among processes, and back, with gradients: the exchange of Ulysses (arXiv 2309.14509)."""

from __future__ import annotations

from typing import Any

import torch

from ..heads import HeadShard
from ..ring import all_to_all
from .shards import gather_heads, lengths_of


class HeadExchange:
    """Each process gives its tokens of the others' heads for their tokens of its own heads.

    diffusers exchanges inside a function of its own, below autograd, where nothing but queries, keys and values gets a
    gradient. Here every tensor does, so that what a layer learned has its gradient too.

    Args:
        config: diffusers' ``ContextParallelConfig``.
        heads: of the layer.

    Raises:
        ValueError: the heads cannot be shared.
    """

    def __init__(self, config: Any, heads: int) -> None:
        self.ranks: int = config.ulysses_degree
        self.rank: int = config._ulysses_local_rank
        self.group = config._ulysses_mesh.get_group()
        self.anything = bool(getattr(config, "ulysses_anything", False))
        self.total = heads
        # Other tensors of a call may have as many tokens: a call asks once.
        self._lengths: dict[int, list[int]] = {}
        each = -(-heads // self.ranks)
        if heads % self.ranks and not self.anything:
            raise ValueError(
                f"{heads} heads cannot be shared evenly by ulysses_degree={self.ranks} processes: choose a divisor of "
                f"{heads}, or ulysses_anything=True."
            )
        if each * (self.ranks - 1) >= heads:
            raise ValueError(
                f"{heads} heads, {each} a process, leave none for the last of ulysses_degree={self.ranks} processes: "
                "choose fewer."
            )
        self.shard = HeadShard(
            self.rank * each,
            min(each, heads - self.rank * each),
            heads,
            lambda own: gather_heads(own, heads, self.ranks, self.group),
            self.ranks,
        )

    def lengths(self, tokens: int) -> list[int]:
        """Tokens of each process, of which this one has ``tokens``. All must call it."""
        if tokens not in self._lengths:
            self._lengths[tokens] = lengths_of(tokens, self.ranks, self.anything, self.group)
        return self._lengths[tokens]

    def there(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, s, H, D]`` of this process' tokens to ``[B, S, h, D]`` of its heads. All must call it."""
        batch, tokens, heads, dim = x.shape
        of_heads, lengths = self._of_heads(heads), self.lengths(tokens)
        own = of_heads[self.rank]
        units = x.permute(2, 1, 0, 3).reshape(heads * tokens, -1)
        came = [own * length for length in lengths]
        units = all_to_all(units, came, [number * tokens for number in of_heads], self.group)
        parts = [part.view(own, -1, batch, dim).permute(2, 1, 0, 3) for part in units.split(came)]
        return torch.cat(parts, 1)

    def back(self, x: torch.Tensor, tokens: int) -> torch.Tensor:
        """``[B, S, h, D]`` of this process' heads to ``[B, s, H, D]`` of its ``tokens``. All must call it."""
        batch, every, own, dim = x.shape
        lengths, of_heads = self.lengths(tokens), self.shard.numbers
        units = x.permute(1, 2, 0, 3).reshape(every * own, -1)
        came = [tokens * number for number in of_heads]
        units = all_to_all(units, came, [length * own for length in lengths], self.group)
        parts = [part.view(tokens, -1, batch, dim).permute(2, 0, 1, 3) for part in units.split(came)]
        return torch.cat(parts, 2)

    def _of_heads(self, heads: int) -> list[int]:
        """Heads of each process; keys may have fewer than queries, shared by groups of these."""
        if heads == self.total:
            return self.shard.numbers
        if heads % self.ranks:
            raise ValueError(f"{heads} key heads cannot be shared evenly by ulysses_degree={self.ranks} processes.")
        return [heads // self.ranks] * self.ranks
