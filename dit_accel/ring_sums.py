"""Sums over the keys of all processes around a ring: each adds up what its own keys give to the queries of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from .ring import RingPart


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

    def begin(self, own: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to add up over the processes; what is returned waits, and gives all of them the sum. All must call it.
        ``own`` must not change before."""
        total = own.contiguous().clone()
        work = dist.all_reduce(total, group=self.part.ring.group, async_op=True)

        def arrived() -> torch.Tensor:
            work.wait()
            return total

        return arrived

    def summed(self, own: torch.Tensor) -> torch.Tensor:
        """:meth:`begin`, and wait."""
        return self.begin(own)()

    def spread(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of :meth:`summed`: what each process' queries have of it, added up. All must call it."""
        return self.summed(grad)


@dataclass(frozen=True, eq=False)
class RingBlockSums(RingSums):
    """Sums of which every block of queries has its own, along dimension -2."""

    def begin(self, own: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Of ``[..., nq, W]`` of all query blocks the sums ``[..., n, W]`` of this process'."""
        counts, ring = self.part.q_counts, self.part.ring
        units = own.movedim(-2, 0).contiguous()
        came = [counts[ring.rank]] * self.processes
        received = units.new_empty(sum(came), *units.shape[1:])
        work = dist.all_to_all_single(received, units, came, counts, group=ring.group, async_op=True)

        return partial(_added, units, received, work, self.processes)

    def spread(self, grad: torch.Tensor) -> torch.Tensor:
        """``[..., n, W]`` of this process' query blocks to ``[..., nq, W]`` of all. All must call it."""
        return self.part.ring.gather(grad, grad.dim() - 2, self.part.q_counts)


def _added(_sent: torch.Tensor, received: torch.Tensor, work: Any, processes: int) -> torch.Tensor:
    """The sum of what came from each process; what was sent lives until then."""
    work.wait()
    return received.unflatten(0, (processes, -1)).sum(0).movedim(0, -2).contiguous()
