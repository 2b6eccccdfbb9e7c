"""The report as one HTML file: nothing outside it is needed, not even a network."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .bootstrap import FEWEST_CLIPS, Interval
from .metrics import METRICS, Metric
from .page_style import SCRIPT, STYLE
from .plot import ParetoPoint, pareto_svg
from .results import DENSE, ClipResult, ComparisonReport, RecipeSummary
from .turns import NOISE

_SERIES_COLOURS = 6
_COST_LEGEND = (
    "Density is the share of attention block pairs that was really read, dense calls included. Time is the whole "
    "pipeline call: text encoding, all steps, decoding. Attention is self-attention only, planning included. Times and "
    "speed-ups are medians, density a mean; below them stand the ends of their intervals. "
)
_MANY_RECIPES = 4
"""From so many recipes on the first sentence gives their range alone; the tables give each."""
_MISSING = '<td class="soft">n/a</td>'
_PLOTTED = ("psnr", "ssim", "lpips", "vmaf")


def report_page(report: ComparisonReport, folder: Path, *, embed_limit: int = 64 * 2**20) -> str:
    """The page as text.

    Args:
        report: what to show; must have at least one prompt.
        folder: where the clips' relative paths start.
        embed_limit: bytes of clips to embed at most; prompts beyond it are listed without pictures, and the
            page says so.
    """
    summaries = [report.summary(name) for name in report.recipes]
    dense = report.summary(DENSE)
    metrics = [m for m in METRICS.values() if any(m.name in s.metrics or m.name in s.missing for s in summaries)]
    body = [
        f"<h1>{escape(_subject(report))}: dense and accelerated</h1>",
        f'<p class="lead">{escape(_headline(report, summaries, dense))}</p>',
        "<h2>Cost</h2>",
        _cost_table(report, summaries, dense),
        f'<p class="soft">{_COST_LEGEND}{escape(dense.spread)}</p>',
        _stages(report, summaries, dense),
        _fidelity(report, summaries, metrics),
        _plots(summaries, dense, metrics),
        _clips(report, folder, metrics, embed_limit),
        _caveats(report, summaries),
        _per_clip(report, metrics),
        _facts(report),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(_subject(report))}: comparison</title>\n<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + f"\n<script>{SCRIPT}</script>\n</body></html>\n"
    )


def _subject(report: ComparisonReport) -> str:
    """The model, where the caller said which; a pipeline's class has many."""
    return report.facts.get("model", report.pipeline)


def _headline(report: ComparisonReport, summaries: Sequence[RecipeSummary], dense: RecipeSummary) -> str:
    seeds = len({seed for _, seed in report.pairs})
    clips = (
        f"{_count(len(report.pairs), 'pair')} of prompt and seed" if seeds > 1 else _count(len(report.pairs), "prompt")
    )
    start = f"{clips}, the same noise for every column. "
    if not summaries:
        return f"{start}Dense takes {dense.total_seconds.median:.2f} s a clip."
    if len(summaries) < _MANY_RECIPES:
        return f"{start}Against dense, end to end: {'; '.join(_measured(s) for s in summaries)}."
    speeds = [s.speedup.median for s in summaries]
    psnr = [s.metrics["psnr"].mean for s in summaries if "psnr" in s.metrics]
    fidelity = f", PSNR to dense from {_number(min(psnr), 1)} to {_number(max(psnr), 1)} dB" if psnr else ""
    return (
        f"{start}Against dense, end to end, {len(summaries)} recipes have median speed-ups from {min(speeds):.2f}× to "
        f"{max(speeds):.2f}×{fidelity}."
    )


def _measured(summary: RecipeSummary) -> str:
    """A recipe's speed-up with its spread, and its fidelity: what was measured, and no judgement."""
    found, psnr = summary.speedup, summary.metrics.get("psnr")
    if found.count == 1:
        spread = "one run of each, no spread"
    else:
        what = f"over {_count(found.count, 'run')}" if found.kind == NOISE else f"{found.kind} interval"
        spread = f"{found.low:.2f}× to {found.high:.2f}×, {what}"
        if found.low <= 1 <= found.high:
            spread += ": no difference shown"
    fidelity = f", PSNR to dense {_number(psnr.mean, 1)} dB" if psnr else ""
    return f"{summary.recipe} {found.median:.2f}× ({spread}){fidelity}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _number(value: float, digits: int) -> str:
    return ("∞" if value > 0 else "−∞") if math.isinf(value) else f"{value:.{digits}f}".replace("-", "−")


def _mean_cell(interval: Interval | None, digits: int, *, best: bool = False, clips: int = 0) -> str:
    """``clips``: how many the legend speaks of; a value for too few of them says so."""
    if interval is None:
        return _MISSING
    few = interval.is_range and clips >= FEWEST_CLIPS
    note = f" (range of {interval.count})" if few else ""
    mark = ' class="best"' if best else ""
    return f"<td><span{mark}>{_number(interval.mean, digits)}</span>{_ends(interval, digits, note)}</td>"


def _median_cell(interval: Interval | None, digits: int, suffix: str = "") -> str:
    if interval is None:
        return _MISSING
    return f"<td><span>{_number(interval.median, digits)}{suffix}</span>{_ends(interval, digits)}</td>"


def _ends(interval: Interval, digits: int, note: str = "") -> str:
    if interval.count == 1:
        return ""
    low, high = _number(interval.low, digits), _number(interval.high, digits)
    return f'<span class="ci">{low}\N{NO-BREAK SPACE}– {high}{note}</span>'


def _name_cell(report: ComparisonReport, name: str, *, describe: bool = True) -> str:
    series = report.recipes.index(name) % _SERIES_COLOURS
    description = report.descriptions.get(name, "") if describe else ""
    detail = f'<span class="ci">{escape(description)}</span>' if description else ""
    # Where a long name may break on a phone.
    broken = re.sub(r"(?<=[;.])(?=\w)", "<wbr>", escape(name))
    return f'<td><span class="swatch s{series}"></span>{broken}{detail}</td>'


def _cost_table(report: ComparisonReport, summaries: Sequence[RecipeSummary], dense: RecipeSummary) -> str:
    timed = dense.attention_seconds is not None or any(s.attention_seconds for s in summaries)
    heads = ["Recipe", "Time, s", "Speed-up", "Density"]  # on a phone the first three are on screen
    heads += ["Attention, s", "Attention speed-up"] if timed else []
    rows = []
    for summary in summaries:
        cells = [
            _name_cell(report, summary.recipe),
            _median_cell(summary.total_seconds, 2),
            _median_cell(summary.speedup, 2, "×"),
            _mean_cell(summary.density, 3),
        ]
        if timed:
            cells += [_median_cell(summary.attention_seconds, 2), _median_cell(summary.attention_speedup, 2, "×")]
        rows.append(cells)
    last = ['<td class="soft">dense</td>', _median_cell(dense.total_seconds, 2), "<td>1×</td>", "<td>1</td>"]
    if timed:
        last += [_median_cell(dense.attention_seconds, 2), "<td>1×</td>"]
    return _table(heads, [*rows, last])


def _stages(report: ComparisonReport, summaries: Sequence[RecipeSummary], dense: RecipeSummary) -> str:
    """Where the time goes; nothing where no run showed it."""
    if not dense.stages:
        return ""
    rows = []
    for summary in (*summaries, dense):
        is_dense = summary.recipe == DENSE
        cells = ['<td class="soft">dense</td>' if is_dense else _name_cell(report, summary.recipe, describe=False)]
        cells += [_median_cell(summary.stages.get(name), 2) for name in ("text", "steps", "decode")]
        cells.append(_mean_cell(summary.computed_share, 3) if not is_dense else "<td>1</td>")
        rows.append(cells)
    text = "Computed is the share of the transformer's forwards that ran all blocks; the others took earlier results."
    table = _table(["Recipe", "Text, s", "Steps, s", "Decoding, s", "Computed"], rows)
    return f'<h2>Where the time goes</h2>{table}<p class="soft">{text}</p>'


def _fidelity_table(report: ComparisonReport, summaries: Sequence[RecipeSummary], metrics: Sequence[Metric]) -> str:
    heads = ["Recipe"]
    for metric in metrics:
        unit = f", {metric.unit}" if metric.unit else ""
        heads.append(f"{metric.label}{unit}\N{NO-BREAK SPACE}{'↑' if metric.higher_is_better else '↓'}")
    rows = []
    for summary in summaries:
        cells = [_name_cell(report, summary.recipe, describe=False)]
        for metric in metrics:
            values = [s.metrics[metric.name].mean for s in summaries if metric.name in s.metrics]
            top = (max if metric.higher_is_better else min)(values) if len(values) > 1 else None
            interval = summary.metrics.get(metric.name)
            best = interval is not None and interval.mean == top
            cells.append(_mean_cell(interval, metric.digits, best=best, clips=summary.clips))
        rows.append(cells)
    return _table(heads, rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _fidelity(report: ComparisonReport, summaries: Sequence[RecipeSummary], metrics: Sequence[Metric]) -> str:
    if not summaries or not metrics:
        return ""
    text = (
        "Means over clips, each against the dense clip of the same prompt and seed; arrows show which way is better. "
        f"{escape(summaries[0].spread)} "
    )
    if any(m.name.startswith("flicker") for m in metrics):
        text += "Flicker is in 8-bit levels: how differently the two clips change from frame to frame."
    return f'<h2>Fidelity to dense</h2>{_fidelity_table(report, summaries, metrics)}<p class="soft">{text}</p>'


def _plots(summaries: Sequence[RecipeSummary], dense: RecipeSummary, metrics: Sequence[Metric]) -> str:
    figures = []
    for metric in metrics:
        if metric.name not in _PLOTTED:
            continue
        points = [
            ParetoPoint(s.recipe, s.total_seconds, s.metrics[metric.name], i % _SERIES_COLOURS)
            for i, s in enumerate(summaries)
            if metric.name in s.metrics
        ]
        svg = pareto_svg(
            points,
            label=metric.label,
            higher_is_better=metric.higher_is_better,
            dense_seconds=dense.total_seconds.median,
            digits=metric.digits,
        )
        if svg:
            unit = f", {metric.unit}" if metric.unit else ""
            turned = "" if metric.higher_is_better else " (axis turned around)"
            figures.append(
                f"<figure><figcaption>{escape(metric.label)}{escape(unit)} <span>{turned}</span>"
                f"</figcaption>{svg}</figure>"
            )
    if not figures:
        return ""
    return (
        "<h2>Fidelity against time</h2>"
        '<p class="soft">Up and to the left is better. '
        "The line joins recipes that no other beats in both.</p>"
        f'<div class="plots">{"".join(figures)}</div>'
    )


def _clips(report: ComparisonReport, folder: Path, metrics: Sequence[Metric], embed_limit: int) -> str:
    out = ['<h2>Clips</h2><p><button id="play" type="button">Pause</button></p>']
    room = embed_limit
    left_out = 0
    for prompt, seed in report.pairs:
        row = [report.result(name, prompt, seed) for name in (DENSE, *report.recipes)]
        files = [folder / result.clip for result in row if result.clip]
        size = sum(path.stat().st_size for path in files)
        if not files:
            continue
        if size > room:
            left_out += 1
            continue
        room -= size
        out.append(f'<p class="prompt">{escape(prompt)} <span class="soft">seed {seed}</span></p>')
        out.append('<div class="clips">')
        out += [_clip(result, folder, metrics) for result in row if result.clip]
        out.append("</div>")
    if left_out:
        out.append(f'<p class="soft">{_count(left_out, "more prompt")} in the clips folder beside this page.</p>')
    return "".join(out) if len(out) > 1 else ""


def _clip(result: ClipResult, folder: Path, metrics: Sequence[Metric]) -> str:
    path = folder / str(result.clip)
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    title = f"{result.recipe}, {result.prompt}"
    if path.suffix == ".png":
        picture = f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'
    else:
        picture = (
            f'<video muted loop playsinline preload="auto" aria-label="{escape(title)}" '
            f'src="data:video/mp4;base64,{data}"></video>'
        )
    facts = [f"{result.total_seconds:.2f} s"]
    for metric in metrics:
        measured = result.metrics.get(metric.name)
        if metric.name in _PLOTTED and measured is not None and measured.value is not None:
            unit = f" {metric.unit}" if metric.unit else ""
            facts.append(f"{metric.label} {_number(measured.value, min(metric.digits, 3))}{unit}")
    # Lines break between facts, not inside one.
    text = " · ".join(fact.replace(" ", "\N{NO-BREAK SPACE}") for fact in facts)
    caption = f"<b>{escape(result.recipe)}</b><br>{escape(text)}"
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _caveats(report: ComparisonReport, summaries: Sequence[RecipeSummary]) -> str:
    reasons: dict[str, list[str]] = {}
    for summary in summaries:
        for name, texts in summary.missing.items():
            for text in texts:
                label = METRICS[name].label if name in METRICS else name
                sentence = text if text.startswith(label) else f"{label}: {text}"
                reasons.setdefault(sentence, []).append(summary.recipe)
    items = [
        escape(text if len(where) == len(summaries) else f"{text} ({', '.join(where)})")
        for text, where in reasons.items()
    ]
    out = ""
    if items:
        out += f"<h2>Not measured</h2><ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"
    if report.notes:
        out += f"<h2>Notes</h2><ul>{''.join(f'<li>{escape(note)}</li>' for note in report.notes)}</ul>"
    return out


def _per_clip(report: ComparisonReport, metrics: Sequence[Metric]) -> str:
    heads = ["Prompt", "Seed", "Recipe", "Time, s", "Density", *(m.label for m in metrics)]
    rows = []
    for prompt, seed in report.pairs:
        for recipe in (DENSE, *report.recipes):
            result = report.result(recipe, prompt, seed)
            cells = [escape(prompt), str(seed), escape(recipe), f"{result.total_seconds:.2f}"]
            cells.append("n/a" if result.density is None else f"{result.density:.3f}")
            for metric in metrics:
                measured = result.metrics.get(metric.name)
                if measured is None:
                    cells.append("–")
                else:
                    cells.append("n/a" if measured.value is None else _number(measured.value, metric.digits))
            rows.append([f"<td>{cell}</td>" for cell in cells])
    return f"<details><summary>Every clip's numbers</summary>{_table(heads, rows)}</details>"


def _facts(report: ComparisonReport) -> str:
    if not report.facts:
        return ""
    facts = {"pipeline": report.pipeline, **report.facts}
    rows = "".join(f"<dt>{escape(name)}</dt><dd><code>{escape(value)}</code></dd>" for name, value in facts.items())
    return f"<h2>How this was made</h2><dl>{rows}</dl>"
