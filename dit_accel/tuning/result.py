"""What a tuning found, as data, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import written_whole
from ..quality.measurement import number_to_json
from ..recipe import Recipe
from .target import Target


@dataclass(frozen=True)
class Row:
    """One recipe of the front, or one that was run.

    Attributes:
        name: in words.
        recipe: for a run of this many steps.
        fidelity: in the target's metric, the mean over prompts; as measured, or as predicted.
        seconds: of a run, the mean over prompts; likewise.
        speedup: times as fast as the dense runs.
        is_measured: whether it was run.
        predicted: fidelity and seconds that the model gave, where it was run.
    """

    name: str
    recipe: Recipe
    fidelity: float
    seconds: float
    speedup: float
    is_measured: bool
    predicted: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        predicted = None
        if self.predicted is not None:
            predicted = {"fidelity": number_to_json(self.predicted[0]), "seconds": self.predicted[1]}
        return {
            "name": self.name,
            "fidelity": number_to_json(self.fidelity),
            "seconds": self.seconds,
            "speedup": self.speedup,
            "measured": self.is_measured,
            "predicted": predicted,
            "recipe": self.recipe.to_dict(),
        }


@dataclass(frozen=True)
class Tuned:
    """The recipe that meets a target, and what else there is.

    Attributes:
        target: what was asked for.
        row: the recipe that meets it, as measured; where none does, the nearest.
        front: of predictions and runs, from fast to slow.
        runs: all that was measured, from fast to slow.
        dense_seconds: of a dense run, the mean over prompts.
        num_steps, prompts: of the runs.
        notes: what the patch of the recipe said.
    """

    target: Target
    row: Row
    front: tuple[Row, ...]
    runs: tuple[Row, ...]
    dense_seconds: float
    num_steps: int
    prompts: int
    notes: tuple[str, ...] = ()

    @property
    def recipe(self) -> Recipe:
        return self.row.recipe

    @property
    def is_met(self) -> bool:
        """Whether the measured run meets the target."""
        return self.target.is_met(self.row.fidelity, self.row.speedup)

    def refusal(self) -> str:
        """A sentence that says what is missed, and what comes nearest."""
        nearest = f"{self.row.name}, keeps {self.spelled(self.row.fidelity)} at {self.row.speedup:.2f}x"
        if self.row.speedup <= 1.0:
            return f"No recipe that was run is faster than dense; the nearest to {self.target}, {nearest}."
        wish = "ask for less speed" if self.target.is_speed else "name a larger error"
        return f"No recipe meets {self.target} on these prompts; the nearest that was run, {nearest}: {wish}."

    def spelled(self, fidelity: float) -> str:
        """A fidelity with the metric's name and unit."""
        metric = self.target.metric
        return f"{metric.label} {fidelity:.{metric.digits}f} {metric.unit}".rstrip()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "target": str(self.target),
            "met": self.is_met,
            "metric": self.target.metric.name,
            "num_steps": self.num_steps,
            "prompts": self.prompts,
            "dense_seconds": self.dense_seconds,
            "found": self.row.to_dict(),
            "notes": list(self.notes),
            "front": [row.to_dict() for row in self.front],
            "runs": [row.to_dict() for row in self.runs],
        }

    def table(self) -> str:
        """The front and all runs, from fast to slow; a star marks what was found, ``~`` what is predicted alone."""
        rows = list(dict.fromkeys([*self.front, *self.runs]))
        metric = self.target.metric
        width = max(len(row.name) for row in rows)
        lines = [f"  {'recipe':<{width}} {metric.label:>9} {'seconds':>9} {'speed':>7}"]
        for row in sorted(rows, key=lambda one: one.seconds):
            mark = "*" if row == self.row else " " if row.is_measured else "~"
            numbers = f"{row.fidelity:>9.{metric.digits}f} {row.seconds:>9.2f} {row.speedup:>6.2f}x"
            lines.append(f"{mark} {row.name:<{width}} {numbers}")
        return "\n".join([*lines, f"  {'dense':<{width}} {'':>9} {self.dense_seconds:>9.2f} {1.0:>6.2f}x"])

    def plot(self, path: Path) -> bool:
        """Write the front as a picture; False without matplotlib.

        Raises:
            ValueError: the file cannot be written.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return False
        metric = self.target.metric
        figure = Figure(figsize=(7.0, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(*_points(self.front), color="#9aa5b1", label="front, predicted and measured")
        axes.scatter(*_points(self.runs), s=18, color="#33658a", label="measured")
        axes.scatter(*_points([self.row]), s=90, color="#d1495b", marker="*", label=self.row.name, zorder=3)
        if not self.target.is_speed:
            axes.axhline(self.target.value, color="#d1495b", linewidth=0.8, linestyle="--")
        axes.set_xlabel("times as fast as dense")
        axes.set_ylabel(f"{metric.label} to dense" + (f" ({metric.unit})" if metric.unit else ""))
        if not metric.higher_is_better:
            axes.invert_yaxis()
        axes.legend(fontsize="small")
        with written_whole(path) as draft:
            figure.savefig(draft, dpi=120)
        return True


def _points(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    drawn = [row for row in rows if abs(row.fidelity) < float("inf")]
    return [row.speedup for row in drawn], [row.fidelity for row in drawn]
