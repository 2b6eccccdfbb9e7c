"""A comparison on a terminal of 80 columns: names may fold, numbers never do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..quality.metrics import METRICS
from .console import plain_console

if TYPE_CHECKING:
    from ..quality.bootstrap import Interval
    from ..quality.results import ComparisonReport, RecipeSummary

# Of two numbers with "to" between them; beside a recipe's name, so many fit in 80 columns.
METRICS_A_TABLE = 3

Cell = Callable[["RecipeSummary"], str]


def show(report: ComparisonReport) -> None:
    """Print cost, fidelity, what the numbers are, and the notes."""
    from ..quality.results import DENSE

    rows = [report.summary(name) for name in report.recipes]
    costs: dict[str, Cell] = {
        "density": lambda row: _mean(row.density, 3),
        "seconds": lambda row: _median(row.total_seconds),
        "speed-up": lambda row: "" if row.recipe == DENSE else _median(row.speedup, "x"),
    }
    _table(costs, [*rows, report.summary(DENSE)])
    names = [name for name in METRICS if any(name in row.metrics for row in rows)]
    for first in range(0, len(names), METRICS_A_TABLE):
        _table({METRICS[name].name: _cell_of(name) for name in names[first : first + METRICS_A_TABLE]}, rows)
    print(f"Seconds and speed-ups are medians, all else means. {rows[0].spread}")
    print(f"Runs: {report.facts['runs']}. Warm-up: {report.facts['warm-up']}.")
    for note in report.notes:
        print(f"note: {note}")
    for name, reasons in rows[0].missing.items():
        print(f"{name} is missing: {'; '.join(reasons)}")


def _cell_of(metric: str) -> Cell:
    return lambda row: _mean(row.metrics.get(metric), METRICS[metric].digits)


def _mean(found: Interval | None, digits: int) -> str:
    return "-" if found is None else f"{found.mean:.{digits}f}{_ends(found, digits)}"


def _median(found: Interval, unit: str = "") -> str:
    return f"{found.median:.2f}{unit}{_ends(found, 2)}"


def _ends(found: Interval, digits: int) -> str:
    return f"\n{found.low:.{digits}f} to {found.high:.{digits}f}" if found.count > 1 else ""


def _table(columns: dict[str, Cell], rows: Sequence[RecipeSummary]) -> None:
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False)
    table.add_column("recipe", overflow="fold")
    for title in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.recipe, *(cell(row) for cell in columns.values()))
    # A recipe may hold brackets, which are markup to other consoles.
    console = plain_console()
    console.print(table)
    console.print()
