"""Sums of states where several processes share a sequence: each has some blocks of queries, and other keys.

What the keys of all processes give to a query is a sum of what each process' keys give. So states are added up over the
processes, and neither keys nor states of single blocks travel. A block of queries has one state, of D x D numbers a
head, whose bytes are half of its keys' and values' at blocks of 128 tokens and head dim 128.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch


class SharedSums(Protocol):
    """How states are added up.

    Attributes:
        processes: that share the sequence.
        tokens: of the sequence.
    """

    @property
    def processes(self) -> int: ...

    @property
    def tokens(self) -> int: ...

    def begin(self, own: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin with :meth:`summed`: what is returned waits for it, and ``own`` must not change before. All must call
        both."""
        ...

    def summed(self, own: torch.Tensor) -> torch.Tensor:
        """Sums over all keys for this process' queries, of what this process' keys give to all: dimension -2 counts the
        blocks of queries, all of them and then this process', or is 1 for a state that serves all. All must call it."""
        ...

    def spread(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of :meth:`summed`. All must call it."""
        ...


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, shared: SharedSums) -> torch.Tensor:
        ctx.shared = shared
        return shared.summed(own)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.shared.spread(*grads), None


def sum_states(h: torch.Tensor, z: torch.Tensor, shared: SharedSums) -> tuple[torch.Tensor, torch.Tensor]:
    """States ``[B, H, n, D, D]`` and ``[B, H, n, D]`` added up, in one exchange, differentiable. All must call it."""
    summed: torch.Tensor = _Summed.apply(torch.cat([h.flatten(-2), z], -1), shared)
    width = h.shape[-2] * h.shape[-1]
    return summed[..., :width].unflatten(-1, h.shape[-2:]), summed[..., width:]
