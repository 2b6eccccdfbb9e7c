"""What the layers of a patched transformer did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .kernels.common.choice import Choice, Operation, spelled


@dataclass
class LayerRecord:
    """What one self-attention layer did: counters, and tensors that are only read when asked for.

    Attributes:
        compiled_dense: dense calls that compiled code counted by itself, int64 by reason; see
            :data:`dit_accel.patches.reasons.PASSED`.
    """

    name: str
    dense_calls: Counter[str] = field(default_factory=Counter)
    sparse_calls: int = 0
    plans_made: int = 0
    density_sum: torch.Tensor | float = 0.0
    nan_calls: torch.Tensor | int = 0
    compiled_dense: torch.Tensor | None = None

    def reset(self) -> None:
        """Begin at nothing; compiled code goes on counting in the tensor that it knows."""
        self.dense_calls = Counter()
        self.sparse_calls = self.plans_made = 0
        self.density_sum, self.nan_calls = 0.0, 0
        if self.compiled_dense is not None:
            self.compiled_dense.zero_()


class BackendsUsed:
    """Which backends ran each operation, and why; in the order of first use."""

    def __init__(self) -> None:
        self._reasons: dict[Operation, dict[str, dict[str, None]]] = {}

    def add(self, operation: Operation, choice: Choice) -> None:
        """An operation ran."""
        self._reasons.setdefault(operation, {}).setdefault(choice.name, {})[choice.reason] = None

    def update(self, other: BackendsUsed) -> None:
        """Take in what another record holds."""
        for operation, names in other._reasons.items():
            for name, reasons in names.items():
                self._reasons.setdefault(operation, {}).setdefault(name, {}).update(reasons)

    def to_dict(self) -> dict[str, dict[str, str]]:
        """By operation the backends that ran it, each with its reasons."""
        return {
            operation: {name: " / ".join(reasons) for name, reasons in names.items()}
            for operation, names in self._reasons.items()
        }


def backend_lines(backends: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A line for each operation and backend of :meth:`BackendsUsed.to_dict`."""
    return [
        f"{spelled(operation)}: {name} ({reason})"
        for operation, names in backends.items()
        for name, reason in names.items()
    ]
