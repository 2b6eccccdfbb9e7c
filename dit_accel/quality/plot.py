"""Fidelity against time as inline SVG, drawn with the page's own colours and fonts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .bootstrap import Interval


@dataclass(frozen=True)
class ParetoPoint:
    """One recipe: seconds per clip (drawn at their median), fidelity (at its mean), and the number of its colour."""

    name: str
    seconds: Interval
    fidelity: Interval
    series: int


_WIDTH, _HEIGHT = 420, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 18, 16, 46


def pareto_svg(
    points: Sequence[ParetoPoint],
    *,
    label: str,
    higher_is_better: bool,
    dense_seconds: float,
    digits: int,
) -> str:
    """Scatter plot with interval bars; the line joins recipes that no other beats in both time and fidelity.

    Args:
        points: recipes; those with infinite fidelity are left out (identical clips have no place on a scale).
        label: of the fidelity axis, with its unit.
        higher_is_better: else the axis is turned around, so that better is always up.
        dense_seconds: time per clip without any recipe, drawn as a dashed line.
        digits: decimals of the fidelity axis at most.

    Returns:
        An ``<svg>`` element, or an empty string if no point can be drawn.
    """
    drawn = [p for p in points if math.isfinite(p.fidelity.mean)]
    if not drawn:
        return ""
    x_ticks = _ticks(0.0, max(dense_seconds, *(p.seconds.high for p in drawn)) * 1.04)
    lows = [p.fidelity.low for p in drawn]
    highs = [p.fidelity.high if math.isfinite(p.fidelity.high) else p.fidelity.mean for p in drawn]
    margin = 0.08 * (max(highs) - min(lows)) or 0.05 * abs(max(highs)) or 1.0
    bottom, top = min(lows) - margin, max(highs) + margin
    if not higher_is_better and min(lows) >= 0:
        bottom = max(0.0, bottom)
    y_ticks = [tick for tick in _ticks(bottom, top) if bottom <= tick <= top]

    def x(seconds: float) -> float:
        return _LEFT + (seconds - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        share = (min(max(value, bottom), top) - bottom) / (top - bottom)
        return _HEIGHT - _BOTTOM - (share if higher_is_better else 1 - share) * (_HEIGHT - _TOP - _BOTTOM)

    out = [
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(label)} against seconds per clip">'
    ]
    floor = _HEIGHT - _BOTTOM
    right, middle = _WIDTH - _RIGHT, (_LEFT + _WIDTH - _RIGHT) / 2
    for tick in y_ticks:
        out.append(_line("grid", _LEFT, y(tick), right, y(tick)))
        out.append(_text("tick", _LEFT - 8, y(tick) + 4, "end", _tick(tick, digits)))
    for tick in x_ticks:
        out.append(_text("tick", x(tick), floor + 18, "middle", _tick(tick, 2)))
    out.append(_line("axis", _LEFT, floor, right, floor))
    out.append(_text("label", middle, _HEIGHT - 6, "middle", "seconds per clip"))
    out.append(_line("dense", x(dense_seconds), _TOP, x(dense_seconds), floor))
    out.append(_text("tick", x(dense_seconds) - 5, floor - 6, "end", "dense"))

    front = _front(drawn, higher_is_better)
    if len(front) > 1:
        path = " ".join(f"{x(p.seconds.median):.1f},{y(p.fidelity.mean):.1f}" for p in front)
        out.append(f'<polyline class="front" points="{path}"/>')
    taken: list[tuple[float, float, float, float]] = []
    for p in drawn:
        px, py = x(p.seconds.median), y(p.fidelity.mean)
        taken.append((px - 6, py - 6, px + 6, py + 6))
    for p in drawn:
        px, py = x(p.seconds.median), y(p.fidelity.mean)
        out.append(f'<g class="s{p.series}">')
        out.append(_line("bar", px, y(p.fidelity.low), px, y(p.fidelity.high)))
        out.append(_line("bar", x(p.seconds.low), py, x(p.seconds.high), py))
        out.append(f'<circle class="dot" cx="{px:.1f}" cy="{py:.1f}" r="5"/>')
        out.append(_text("name", *_place(p.name, px, py, taken), p.name) + "</g>")
    out.append("</svg>")
    return "\n".join(out)


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(kind: str, x: float, y: float, anchor: str, text: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _front(points: Sequence[ParetoPoint], higher_is_better: bool) -> list[ParetoPoint]:
    """Recipes from fast to slow, each better than all faster ones."""
    sign = 1 if higher_is_better else -1
    front: list[ParetoPoint] = []
    for p in sorted(points, key=lambda p: (p.seconds.median, -sign * p.fidelity.mean)):
        if not front or sign * p.fidelity.mean > sign * front[-1].fidelity.mean:
            front.append(p)
    return front


def _place(name: str, px: float, py: float, taken: list[tuple[float, float, float, float]]) -> tuple[float, float, str]:
    """First free place for a name around its point; adds it to ``taken``."""
    width = 6.6 * len(name) + 4
    best: tuple[float, float, str] | None = None
    for dx, dy, anchor in (
        (9, 15, "start"),
        (9, -7, "start"),
        (-9, -7, "end"),
        (-9, 15, "end"),
        (0, -13, "middle"),
        (0, 24, "middle"),
        (9, -22, "start"),
        (9, 30, "start"),
    ):
        tx, ty = px + dx, py + dy
        left = tx - {"start": 0.0, "end": width, "middle": width / 2}[anchor]
        box = (left, ty - 11, left + width, ty + 3)
        inside = box[0] >= _LEFT and box[2] <= _WIDTH and box[1] >= 0 and box[3] <= _HEIGHT - _BOTTOM
        if inside and best is None:
            best = (tx, ty, anchor)
        free = all(box[2] < t[0] or t[2] < box[0] or box[3] < t[1] or t[3] < box[1] for t in taken)
        if inside and free:
            taken.append(box)
            return tx, ty, anchor
    return best or (px + 9, py - 7, "start")


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover the range, about ``count`` steps."""
    raw = max(high - low, 1e-9) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.floor(low / step)
    return [step * i for i in range(first, math.ceil(high / step - 1e-9) + 1)]


def _tick(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) or "0"
