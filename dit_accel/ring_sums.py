"""Sums over the keys of all processes around a ring: each adds up what its own keys give to the queries of all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from .ring import RingPart, all_to_all


@dataclass(frozen=True, eq=False)
class RingSums:
    """Sums that serve every query: of a tensor that each process has, however many dimensions.

    Attributes:
        part: of the sequence, that this process has.
    """

    part: RingPart

    @property
    def processes(self) -> int:
        """Around the ring."""
        return self.part.ring.size

    @property
    def tokens(self) -> int:
        """Of the whole sequence, with its padding."""
        return self.part.total

    def summed(self, own: torch.Tensor) -> torch.Tensor:
        """The sum over the processes, in all of them. All must call it."""
        total = own.contiguous().clone()
        dist.all_reduce(total, group=self.part.ring.group)
        return total

    def spread(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of :meth:`summed`: what each process' queries have of it, added up. All must call it."""
        return self.summed(grad)


@dataclass(frozen=True, eq=False)
class RingBlockSums(RingSums):
    """Sums of which every block of queries has its own, along dimension -2."""

    def summed(self, own: torch.Tensor) -> torch.Tensor:
        """``[..., nq, W]`` of all query blocks to ``[..., n, W]`` of this process', summed. All must call it."""
        counts, rank = self.part.q_counts, self.part.ring.rank
        units = own.movedim(-2, 0)
        came = [counts[rank]] * self.processes
        parts = all_to_all(units, came, counts, self.part.ring.group)
        return parts.unflatten(0, (self.processes, -1)).sum(0).movedim(0, -2).contiguous()

    def spread(self, grad: torch.Tensor) -> torch.Tensor:
        """``[..., n, W]`` of this process' query blocks to ``[..., nq, W]`` of all. All must call it."""
        return self.part.ring.gather(grad, grad.dim() - 2, self.part.q_counts)
