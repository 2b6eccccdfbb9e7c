"""Which heads of a layer a call has, where several processes share them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class HeadShard:
    """Consecutive heads that this process attends, of a layer whose other heads other processes attend.

    Attributes:
        first, number: of this process.
        total: heads of the layer.
        gather: ``[B, number, ...]`` of every process to ``[B, total, ...]``, the same in all. All must call it.
        ranks: processes.
    """

    first: int
    number: int
    total: int
    gather: Callable[[torch.Tensor], torch.Tensor]
    ranks: int = 1

    @property
    def place(self) -> tuple[int, int, int]:
        """What tells one shard from another: first, number and total."""
        return self.first, self.number, self.total

    @property
    def numbers(self) -> list[int]:
        """Heads of each process."""
        each = -(-self.total // self.ranks)
        return [min(each, self.total - rank * each) for rank in range(self.ranks)]

    def of_ranks(self, own: torch.Tensor) -> torch.Tensor:
        """``[ranks, n]``: what each process has, from ``own [n]``. All must call it."""
        each = -(-self.total // self.ranks)
        return self.gather(own[None, None].expand(1, self.number, -1))[0, ::each]

    def own(self, of_all: torch.Tensor, dim: int) -> torch.Tensor:
        """This process' part of something that has an entry per head, or one for all, along ``dim``.

        Raises:
            ValueError: it has another number of entries.
        """
        entries = of_all.shape[dim]
        if entries == 1:
            return of_all
        if entries != self.total:
            raise ValueError(f"What is given for {entries} heads does not fit a layer of {self.total}.")
        return of_all.narrow(dim, self.first, self.number)
