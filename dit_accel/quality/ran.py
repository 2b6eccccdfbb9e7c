"""What the patch of one run did, as plain data, and what a reader must know of all of a recipe's runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from ..records import backend_lines


class RunSummary(Protocol):
    """What a patch did so far; the part of ``dit_accel.patches.PatchSummary`` used here."""

    @property
    def sparse_calls(self) -> int: ...
    @property
    def dense_calls(self) -> Mapping[str, int]: ...
    @property
    def replayed_calls(self) -> int: ...
    @property
    def nan_calls(self) -> int: ...
    @property
    def mean_density(self) -> float | None: ...
    @property
    def density(self) -> float | None: ...
    @property
    def computed_forwards(self) -> int: ...
    @property
    def skipped_forwards(self) -> int: ...
    @property
    def backends(self) -> Mapping[str, Mapping[str, str]]: ...
    @property
    def plan_seconds(self) -> float: ...
    @property
    def sparse_seconds(self) -> float: ...
    @property
    def dense_seconds(self) -> float: ...


@dataclass(frozen=True)
class Ran:
    """One run under a patch.

    Attributes:
        sparse_calls, nan_calls: self-attention calls.
        dense_calls: likewise, by reason.
        density: of the sparse calls; None without any.
        computed_forwards, skipped_forwards: of recipes with reuse; 0 without.
        backends: a line for each operation and backend.
    """

    sparse_calls: int
    nan_calls: int
    dense_calls: Mapping[str, int] = field(default_factory=dict)
    density: float | None = None
    computed_forwards: int = 0
    skipped_forwards: int = 0
    backends: tuple[str, ...] = ()

    @classmethod
    def of(cls, summary: RunSummary) -> Ran:
        """What a summary says."""
        return cls(
            summary.sparse_calls,
            summary.nan_calls,
            {reason: count for reason, count in summary.dense_calls.items() if count},
            summary.density,
            summary.computed_forwards,
            summary.skipped_forwards,
            tuple(backend_lines(summary.backends)),
        )

    @property
    def computed_share(self) -> float:
        """Share of the forwards that ran all blocks."""
        forwards = self.computed_forwards + self.skipped_forwards
        return self.computed_forwards / forwards if forwards else 1.0

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"backends": list(self.backends)}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Ran:
        """Inverse of :meth:`to_json`."""
        return cls(**{**tree, "backends": tuple(tree["backends"])})


def notes(name: str, runs: Sequence[Ran], warm_sparse: int | None) -> list[str]:
    """Fallbacks and failures of a recipe's runs as sentences.

    Args:
        warm_sparse: sparse calls of its warm-up; None without one.
    """
    dense = all_dense_calls(runs)
    dense_total, sparse = sum(dense.values()), sum(run.sparse_calls for run in runs)
    nan, found = sum(run.nan_calls for run in runs), []
    if dense_total:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dense.items())
        found.append(f"{name}: {dense_total} of {sparse + dense_total} self-attention calls ran dense ({reasons}).")
    if not sparse + dense_total:
        found.append(f"{name}: no self-attention call went through the patch.")
    if nan:
        found.append(f"{name}: {nan} attention calls gave NaN.")
    if warm_sparse == 0 and sparse:
        found.append(f"{name}: the warm-up ran no sparse call; its first run's time holds what is compiled on use.")
    return found + [f"{name}: {line}." for line in dict.fromkeys(line for run in runs for line in run.backends)]


def all_dense_calls(runs: Sequence[Ran]) -> dict[str, int]:
    """Dense calls of all runs, by reason."""
    total: Counter[str] = Counter()
    for run in runs:
        total.update(dict(run.dense_calls))
    return dict(total)
