"""Tokens for heads among processes, and back, with gradients: the exchange of Ulysses (arXiv 2309.14509)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..heads import HeadShard
from ..ring import all_to_all
from .shards import gather_heads, lengths_of

Streams = Sequence[Sequence[int]]


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

    def there(self, x: torch.Tensor, streams: Streams | None = None) -> torch.Tensor:
        """``[B, s, H, D]`` of this process' tokens to ``[B, S, h, D]`` of its heads. All must call it.

        Args:
            streams: of each stream that is split by itself how many tokens each process has. Tokens then come stream by
                stream, as the model has them; without, as the processes have them.
        """
        batch, tokens, heads, dim = x.shape
        of_heads, streams = self._of_heads(heads), streams or [self.lengths(tokens)]
        own = of_heads[self.rank]
        rows, counts = [], []
        for part, lengths in zip(x.split([stream[self.rank] for stream in streams], 1), streams, strict=True):
            rows.append(_by_process(part, of_heads))
            counts.append(([own * length for length in lengths], [number * part.shape[1] for number in of_heads]))
        came = all_to_all(rows, counts, self.group).view(-1, own, batch, dim)
        # Kernels want a token's heads side by side.
        return came.permute(2, 0, 1, 3).contiguous()

    def back(self, x: torch.Tensor, tokens: int, streams: Streams | None = None) -> torch.Tensor:
        """``[B, S, h, D]`` of this process' heads to ``[B, s, H, D]`` of its ``tokens``. All must call it.

        Args:
            streams: as :meth:`there` was given.
        """
        batch, _, own, dim = x.shape
        of_heads, streams = self.shard.numbers, streams or [self.lengths(tokens)]
        rows, counts = [], []
        for part, lengths in zip(x.split([sum(stream) for stream in streams], 1), streams, strict=True):
            rows.append(part.permute(1, 2, 0, 3).reshape(-1, batch * dim))
            sent = [length * own for length in lengths]
            counts.append(([lengths[self.rank] * number for number in of_heads], sent))
        came = all_to_all(rows, counts, self.group).split([sum(one) for one, _ in counts])
        return torch.cat([_by_token(part, of_heads, batch) for part in came]).flatten(1, 2).permute(2, 0, 1, 3)

    def _of_heads(self, heads: int) -> list[int]:
        """Heads of each process; keys may have fewer than queries, shared by groups of these."""
        if heads == self.total:
            return self.shard.numbers
        if heads % self.ranks:
            raise ValueError(f"{heads} key heads cannot be shared evenly by ulysses_degree={self.ranks} processes.")
        return [heads // self.ranks] * self.ranks


def _by_process(x: torch.Tensor, of_heads: list[int]) -> torch.Tensor:
    """``[B, s, H, D]`` as a row of all batch entries for each token and head, the heads of one process after those of
    another."""
    batch, _, _, dim = x.shape
    if len(set(of_heads)) == 1:
        # One copy in place of two.
        shared = x.unflatten(2, (len(of_heads), -1))
        return shared.permute(2, 1, 3, 0, 4).reshape(-1, batch * dim)
    parts = x.split(of_heads, 2)
    return torch.cat([part.permute(1, 2, 0, 3).reshape(-1, batch * dim) for part in parts])


def _by_token(rows: torch.Tensor, of_heads: list[int], batch: int) -> torch.Tensor:
    """The inverse: ``[s, 1, H, B, D]``, or of as many heads each ``[s, n, H / n, B, D]``, not copied yet."""
    if len(set(of_heads)) == 1:
        return rows.view(len(of_heads), -1, of_heads[0], batch, rows.shape[1] // batch).transpose(0, 1)
    tokens, width = len(rows) // sum(of_heads), rows.shape[1]  # of no tokens a view can infer no size
    parts = rows.split([tokens * number for number in of_heads])
    whole = torch.cat([part.view(tokens, number, width) for part, number in zip(parts, of_heads, strict=True)], 1)
    return whole.view(tokens, 1, sum(of_heads), batch, width // batch)
