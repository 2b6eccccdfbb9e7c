"""A picture of a plan over the steps of a run, as inline SVG: notebooks and pages show it as it is."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .step_summary import StepSummary

_WIDTH, _HEIGHT = 640, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 34, 44
# Told apart by those who see few colours, and on white as on black.
COLOURS = {"dense": "#8a8f98", "planned": "#d9822b", "reused": "#3b82c4", "skipped": "#3f9c6b"}
_MEANING = {"dense": "all pairs", "planned": "plan made", "reused": "plan reused", "skipped": "layers skipped"}


def plan_over_steps(steps: Sequence[StepSummary]) -> str:
    """Bars of the share of block pairs that each step computed, coloured by what the step did with its plan.

    A step in which a reuse answered for all of its attention has a bar of no height, and a mark in its place.

    Args:
        steps: ``handle.summary().steps`` of one run and transformer, in order.

    Returns:
        An ``<svg>`` element.

    Raises:
        ValueError: there are no steps, or they are of several runs or transformers.
    """
    if not steps:
        raise ValueError("No steps were recorded: call handle.record_steps() before the pipeline runs.")
    places = {(step.transformer, step.run) for step in steps}
    if len(places) > 1:
        raise ValueError(f"plan_over_steps draws one run of one transformer, got {len(places)} of them.")
    floor, height = _HEIGHT - _BOTTOM, _HEIGHT - _TOP - _BOTTOM
    pitch = (_WIDTH - _LEFT - _RIGHT) / len(steps)
    label = "share of block pairs computed at each step"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}" '
        f'style="max-width:{_WIDTH}px;width:100%" font-family="sans-serif" font-size="12" fill="currentColor">'
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = floor - share * height
        out.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" '
            'stroke-opacity="0.2"/>'
        )
        out.append(_text(_LEFT - 6, y + 4, "end", f"{share:g}"))
    for place, step in enumerate(steps):
        x, share = _LEFT + place * pitch, step.mean_density or 0.0
        top = min(floor - share * height, floor - 2)
        out.append(
            f'<rect class="{step.kind}" x="{x + 0.1 * pitch:.2f}" y="{top:.2f}" width="{0.8 * pitch:.2f}" '
            f'height="{floor - top:.2f}" fill="{COLOURS[step.kind]}"><title>{escape(str(step))}</title></rect>'
        )
    every = max(1, -(-len(steps) // 20))
    for place in range(0, len(steps), every):
        index = steps[place].step
        number = place if index is None else index
        out.append(_text(_LEFT + (place + 0.5) * pitch, floor + 16, "middle", str(number + 1)))
    out.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, "middle", "step"))
    out.append(_text(_LEFT - 40, 12, "start", "share of block pairs"))
    x = _LEFT + 120.0
    for kind in dict.fromkeys(step.kind for step in steps):
        text = _MEANING[kind]
        out.append(f'<rect x="{x}" y="3" width="10" height="10" fill="{COLOURS[kind]}"/>')
        out.append(_text(x + 14, 12, "start", text))
        x += 30 + 7.0 * len(text)
    return "".join([*out, "</svg>"])


def _text(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
