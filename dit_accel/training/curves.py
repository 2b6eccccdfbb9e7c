"""Curves of a training: JSON to compute with, PNG to look at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import write_text, written_whole

JSON_NAME, PNG_NAME = "curves.json", "curves.png"


@dataclass
class Curves:
    """What a training measured.

    Attributes:
        steps: one entry a step: step, loss, each term of the objective, learning rate, density, seconds.
        evaluations: now and then: step, velocity error against dense, flow-matching loss of both.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)

    def until(self, step: int) -> Curves:
        """The part up to a step, for a run that is resumed there."""
        return Curves(
            [entry for entry in self.steps if entry["step"] <= step],
            [entry for entry in self.evaluations if entry["step"] <= step],
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Curves:
        """The inverse of :meth:`to_dict`."""
        return cls(list(data["steps"]), list(data["evaluations"]))

    def to_dict(self) -> dict[str, list[dict[str, float]]]:
        """Plain data for JSON."""
        return {"steps": self.steps, "evaluations": self.evaluations}

    def write(self, folder: Path) -> None:
        """Write both files. The picture is left out without matplotlib.

        Raises:
            ValueError: they cannot be written.
        """
        write_text(folder / JSON_NAME, json.dumps(self.to_dict(), indent=1) + "\n")
        try:
            import matplotlib
        except ImportError:
            return
        matplotlib.use("Agg", force=False)
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        self._lines(left, self.steps, ("loss",), "loss")
        self._lines(right, self.evaluations, ("velocity_error",), "velocity error against dense")
        with written_whole(folder / PNG_NAME) as draft:
            figure.savefig(draft, dpi=120)

    @staticmethod
    def _lines(axes: Any, entries: Sequence[Mapping[str, float]], names: Sequence[str], label: str) -> None:
        for name in names:
            points = [(entry["step"], entry[name]) for entry in entries if name in entry]
            if points:
                axes.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else None)
                values = [value for _, value in points]
                # Within a decade a logarithmic axis has no plain number to label.
                if min(values) > 0 and max(values) > 10 * min(values):
                    axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
