"""Processes that run one forward together, and must skip the same blocks of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class Together:
    """This process and those that wait for it in the blocks of a forward.

    Attributes:
        groups: of processes that share the forward's tokens, heads or weights; empty for one process alone.
    """

    groups: tuple[Any, ...] = ()

    @classmethod
    def of(cls, model: nn.Module) -> Together:
        """Those of a transformer: of diffusers' ``enable_parallelism``, and of weights that are sharded."""
        if not (dist.is_available() and dist.is_initialized()):
            return _ALONE  # without a walk through all weights, a millisecond of every forward
        config = getattr(model, "_parallel_config", None)
        context = getattr(config, "context_parallel_config", None)
        groups = [] if context is None else [context._flattened_mesh.get_group()]
        mesh = next((p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")), None)
        if mesh is not None:
            groups += mesh.get_all_groups()
        return cls(tuple(groups))

    def total(self, own: torch.Tensor) -> torch.Tensor:
        """The sum over all of them, the same in each; up to a factor where groups overlap. All must call it."""
        if self.groups:
            own = own.clone()
        for group in self.groups:
            dist.all_reduce(own, group=group)
        return own

    def any(self, own: bool, device: torch.device) -> bool:
        """Whether any of them says so. All must call it; waits for the device where there are others."""
        if not self.groups:
            return own
        return bool(self.total(torch.tensor(float(own), device=device)) > 0)


_ALONE = Together()
