"""A summary as a notebook shows it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from .steps_svg import plan_over_steps

if TYPE_CHECKING:
    from .step_summary import StepSummary
    from .summary import LayerSummary, PatchSummary


def as_html(summary: PatchSummary) -> str:
    """What the text says, a table with a row per layer, and the latest recorded run of each transformer."""
    head, *rest = summary.lines()
    text = "".join(f"<div>{escape(line)}</div>" for line in rest)
    columns = ["layer", "sparse calls", "dense calls", "plans", "density"]
    columns += ["from a cache"] * bool(summary.cached_calls) + ["NaN"] * bool(summary.nan_calls)
    rows = "".join(_row(_cells(layer, summary), "td") for layer in summary.layers)
    table = f"<table><thead>{_row(columns, 'th')}</thead><tbody>{rows}</tbody></table>"
    return f"<div><b>{escape(head)}</b>{text}{_pictures(summary.steps)}{table}</div>"


def _pictures(steps: Sequence[StepSummary]) -> str:
    latest = {step.transformer: step.run for step in steps}
    pictures = (
        (name, plan_over_steps([step for step in steps if (step.transformer, step.run) == (name, run)]))
        for name, run in latest.items()
    )
    return "".join(f"<div>{escape(name)}{picture}</div>" for name, picture in pictures)


def _cells(layer: LayerSummary, summary: PatchSummary) -> Iterable[str]:
    yield layer.name
    yield str(layer.sparse_calls)
    yield ", ".join(f"{count} ({reason})" for reason, count in layer.dense_calls.items()) or "0"
    yield str(layer.plans_made)
    yield "-" if layer.density is None else f"{layer.density:.3f}"
    if summary.cached_calls:
        yield str(layer.cached_calls)
    if summary.nan_calls:
        yield str(layer.nan_calls)


def _row(cells: Sequence[str] | Iterable[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"
