"""What the layers of a patched transformer did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .kernels.common.choice import Choice, Operation, spelled

# What a device has counted is put together before there is more than so much of it.
KEPT_PARTS = 32


class Tally:
    """A sum of what lies on devices. An addition a call would cost the host more than to keep the parts; nothing waits
    for a device before the sum is asked for."""

    def __init__(self, count: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """``count`` makes a 0-d tensor from a tensor of parts ``[N]``."""
        self._count = count
        self._parts: list[torch.Tensor] = []
        self._sums: dict[torch.device, torch.Tensor] = {}

    def add(self, part: torch.Tensor) -> None:
        """A 0-d tensor."""
        self._parts.append(part)
        if len(self._parts) >= KEPT_PARTS:
            self._put_together()

    def total(self) -> float:
        """Of all parts; waits for their devices."""
        self._put_together()
        return sum((float(part) for part in self._sums.values()), 0.0)

    def reset(self) -> None:
        """Begin at nothing."""
        self._parts.clear()
        self._sums.clear()

    def _put_together(self) -> None:
        parts = self._parts[:]  # another thread may add to them meanwhile
        for device in {part.device for part in parts}:
            found = self._count(torch.stack([part for part in parts if part.device == device])).double()
            self._sums[device] = found if device not in self._sums else self._sums[device] + found
        del self._parts[: len(parts)]


def _nans(x: torch.Tensor) -> torch.Tensor:
    return x.isnan().sum()


class Shares(NamedTuple):
    """What a sparse call computed of dense attention, 0-d tensors.

    Attributes:
        density: its share of the work.
        seen: share of the token pairs that it saw, where a mask hides some within the kept blocks; else None.
    """

    density: torch.Tensor
    seen: torch.Tensor | None = None


@dataclass
class LayerRecord:
    """What one self-attention layer did: counters, and tensors that are only read when asked for.

    Attributes:
        densities: of the sparse calls.
        hidden: what masks of tokens hide of the kept blocks, as a share of all pairs, in calls with such a mask.
        largest: largest number of what shows a NaN in a sparse call's output, so NaN where there is one.
        compiled_dense: dense calls that compiled code counted by itself, int64 by reason; see
            :data:`dit_accel.patches.reasons.PASSED`.
        replayed_calls: sparse calls that a CUDA graph computed.
        replayed_nans: those of them whose output held a NaN, which the graphs of a device count, int64 ``[]``.
    """

    name: str
    dense_calls: Counter[str] = field(default_factory=Counter)
    sparse_calls: int = 0
    plans_made: int = 0
    densities: Tally = field(default_factory=lambda: Tally(torch.sum))
    hidden: Tally = field(default_factory=lambda: Tally(torch.sum))
    largest: Tally = field(default_factory=lambda: Tally(_nans))
    compiled_dense: torch.Tensor | None = None
    replayed_calls: int = 0
    replayed_nans: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    @property
    def density_sum(self) -> float:
        """Sum of the densities of the sparse calls; waits for the device."""
        return self.densities.total()

    @property
    def seen_sum(self) -> float:
        """Sum of the shares of token pairs that the sparse calls saw; waits for the device."""
        return self.densities.total() - self.hidden.total()

    @property
    def nan_calls(self) -> int:
        """Sparse calls whose output held a NaN; waits for the device."""
        return int(self.largest.total()) + sum(map(int, list(self.replayed_nans.values())))

    def add_sparse(self, shares: Shares) -> None:
        """A sparse call."""
        self.sparse_calls += 1
        self.densities.add(shares.density)
        if shares.seen is not None:
            self.hidden.add(shares.density - shares.seen)

    def reset(self) -> None:
        """Begin at nothing; compiled code goes on counting in the tensor that it knows."""
        self.dense_calls = Counter()
        self.sparse_calls = self.plans_made = self.replayed_calls = 0
        self.densities.reset()
        self.hidden.reset()
        self.largest.reset()
        if self.compiled_dense is not None:
            self.compiled_dense.zero_()
        for nans in list(self.replayed_nans.values()):
            nans.zero_()


@dataclass
class SharedWork:
    """Sparse calls that processes shared: what each of them kept, known to all.

    Attributes:
        calls: counted.
        density: sum over the calls, float ``[ranks]``: kept share of the block pairs of a process.
        work: the same of its kept block pairs, as a share of those of all processes.
    """

    calls: int = 0
    density: torch.Tensor | float = 0.0
    work: torch.Tensor | float = 0.0

    def add(self, density: torch.Tensor, pairs: torch.Tensor) -> None:
        """Take in a call: float ``[ranks]`` densities, and block pairs of which these are shares."""
        kept = density * pairs
        self.calls += 1
        self.density = self.density + density
        self.work = self.work + kept / kept.sum().clamp_min(torch.finfo(kept.dtype).tiny)

    def update(self, other: SharedWork) -> None:
        """Take in what another record holds."""
        self.calls += other.calls
        self.density = self.density + other.density
        self.work = self.work + other.work

    def densities(self) -> tuple[float, ...]:
        """Mean density of each process; empty where nothing was shared."""
        return tuple((self.density / self.calls).tolist()) if isinstance(self.density, torch.Tensor) else ()

    def imbalance(self) -> float | None:
        """Work of the busiest process over the mean of all; None where nothing was shared."""
        return float(self.work.max() / self.work.mean()) if isinstance(self.work, torch.Tensor) else None


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
