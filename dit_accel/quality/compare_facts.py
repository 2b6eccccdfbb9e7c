"""What a reader must know of a comparison: how it was made, and what its recipes really ran."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from ..records import backend_lines

if TYPE_CHECKING:
    from .compare import RunSummary

_PACKAGES = ("dit-accel", "torch", "diffusers", "triton")


class Tally:
    """What one recipe's patches did, over the measured runs of all clips.

    Attributes:
        differing: compiled runs that gave other pixels when they were repeated.
    """

    def __init__(self) -> None:
        self.dense: Counter[str] = Counter()
        self.sparse = 0
        self.nan = 0
        self.backends: dict[str, None] = {}
        self.differing = 0
        self._warm_sparse: int | None = None

    def warmed_up(self, summary: RunSummary) -> None:
        """Remember what the warm-up ran."""
        self._warm_sparse = summary.sparse_calls

    def add(self, summary: RunSummary) -> None:
        """Count a measured run."""
        self.dense.update(dict(summary.dense_calls))
        self.sparse += summary.sparse_calls
        self.nan += summary.nan_calls
        self.backends |= dict.fromkeys(backend_lines(summary.backends))

    def notes(self, name: str) -> list[str]:
        """Fallbacks and failures as sentences."""
        dense_total, notes = sum(self.dense.values()), []
        if dense_total:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.dense.items() if count)
            calls = self.sparse + dense_total
            notes.append(f"{name}: {dense_total} of {calls} self-attention calls ran dense ({reasons}).")
        if not self.sparse + dense_total:
            notes.append(f"{name}: no self-attention call went through the patch.")
        if self.nan:
            notes.append(f"{name}: {self.nan} attention calls gave NaN.")
        if self._warm_sparse == 0 and self.sparse:
            notes.append(f"{name}: the warm-up ran no sparse call; its first run's time holds what is compiled on use.")
        if self.differing:
            notes.append(f"{name}: {self.differing} timed runs gave other pixels than the same run before them.")
        return notes + [f"{name}: {line}." for line in self.backends]


def describe(pipe: Any, arguments: Mapping[str, Any], steps: int, repeat: int, compiled: bool) -> dict[str, str]:
    """Device, versions, settings and procedure, as text.

    Args:
        steps: of the warm-up; 0 for none.
        repeat: timed runs of each clip.
        compiled: whether the pipeline is.
    """
    settings = {name: value for name, value in arguments.items() if isinstance(value, (str, int, float, bool))}
    times = "once" if repeat == 1 else f"{repeat} times"
    turns = f"each clip {times} dense and {times} under each recipe, in turns; patched anew for every run"
    if compiled:
        turns += "; the pipeline is compiled, so an untimed run goes before each timed one"
    return {
        "device": _device(pipe),
        "versions": ", ".join(f"{name} {found}" for name in _PACKAGES if (found := _version(name)) is not None),
        "settings": ", ".join(f"{name}={value}" for name, value in settings.items()) or "pipeline defaults",
        "warm-up": f"{steps} untimed steps of dense and of each recipe, at the same size" if steps else "none",
        "runs": turns,
    }


def _device(pipe: Any) -> str:
    """Where the pipeline runs, which under offloading is not where its weights are."""
    device = torch.device(getattr(pipe, "_execution_device", getattr(pipe, "device", "cpu")))
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)" if device.type == "cpu" else device.type


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
