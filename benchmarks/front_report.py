"""What reuse_front.py measured as a table in Markdown and a picture, and both in a page of the docs."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel.quality.bootstrap import Interval, bootstrap_mean

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "fidelity.md"
PICTURE = ROOT / "docs" / "images" / "reuse_front.png"
BEGIN, END = "<!-- front: benchmarks/reuse_front.py --docs -->\n", "<!-- end of front -->\n"

# Seconds of Wan 2.1 1.3B, 832 x 480 x 81, compiled, on one H200 (results/whole_runs_h200.json): attention of a dense
# step in cuDNN and, with ``schedule.own_dense``, in our kernel, what else a computed step does, what a search takes
# beyond attention in our kernel, means beyond the pairs that count for them, a skipped step, and text and decoding.
ATTENTION, OWN, REST, SEARCH, MEANS, SKIPPED, AROUND = 0.76, 0.62, 0.29, 0.47, 0.04, 0.005, 2.9

# Rows whose names stand in the picture.
NAMED = {
    "mass:density=.3,means=True@schedule.own_dense=True": "default",
    "mass:density=.3": "default before",
    "carried:density=.2,means=True": "carried, 0.2",
    "carried:density=.1,means=True": "carried, 0.1",
    "balanced": "balanced",
    "fast": "fast",
    "max": "max",
}

# The same of a card of ``dit-accel verify``.
MEANS_AT = "select.density=0.3;compensate=residual;schedule.own_dense=True"
OWN_DENSE = "compensate.means=True;schedule.own_dense=True"
NAMED_OF_CARD = {
    f"mass;{MEANS_AT}": "default",
    "mass;select.density=0.3": "default before",
    "auto": "default at 0.25",  # which it was
    f"carried;select.density=0.1;{OWN_DENSE}": "carried, 0.1",
    f"carried;select.density=0.1;{OWN_DENSE};schedule.dense_fraction=0.1": "carried, 0.1, fewer dense steps",
    "fast": "fast",
    "max;select.density=0.25": "max",
}

KINDS = {"cache": "steps skipped", "sparse": "sparse attention", "both": "both"}
# Column, digits, and whether more is better.
SHOWN = {"ssim": ("SSIM", 4), "lpips": ("LPIPS", 4), "flicker": ("flicker", 2)}


@dataclass(frozen=True)
class Row:
    """One row of one number of steps.

    Attributes:
        name: as it was given.
        kind: a key of :data:`KINDS`.
        computed: share of the forwards that ran all blocks.
        density: mean over these, dense steps with them.
        searches: of a run.
        steps: of a run.
        own: share of the computed forwards whose dense attention ran in our kernel, searches left out.
        means: share of the computed forwards with means of the blocks left out.
        metrics: means over clips; what could not be measured is missing.
    """

    name: str
    kind: str
    computed: float
    density: float
    searches: int
    steps: int
    metrics: dict[str, Interval]
    own: float = 0.0
    means: float = 0.0

    @classmethod
    def of(cls, name: str, row: dict[str, Any], steps: int) -> Row:
        """Of a row that has a clip."""
        clips = row["clips"].values()
        metrics = {}
        for metric in ("psnr", *SHOWN):
            values = [clip.get(metric) for clip in clips]
            if None not in values:
                metrics[metric] = bootstrap_mean([float(value) for value in values])
        computed, mean, kept = (
            sum(clip[key] or 0.0 for clip in clips) / len(clips)
            for key in ("computed_share", "mean_density", "density")
        )
        searches = searches_of(row["recipe"])
        own = 0.0
        if row["recipe"].get("schedule", {}).get("own_dense") and kept < 1:
            own = max(0.0, (mean - kept) / (1 - kept) - searches / (computed * steps))
        means = (1 - mean) / (1 - kept) if has_means(row["recipe"]) and kept < 1 else 0.0
        return cls(name, kind_of(row["recipe"]), computed, mean, searches, steps, metrics, own, means)

    @property
    def work(self) -> float:
        """Of dense attention's, the share that was done."""
        return self.computed * self.density

    @property
    def speedup(self) -> float:
        """Of a whole run of Wan 2.1 1.3B, composed of the times of its steps.

        The built-in model's own times say little: so few tokens wait for the host.
        """
        attention = ATTENTION * self.density - (ATTENTION - OWN) * self.own + MEANS * self.means
        step = self.computed * (REST + attention) + (1 - self.computed) * SKIPPED
        searched = self.searches * (SEARCH - (ATTENTION - OWN))
        return (self.steps * (REST + ATTENTION) + AROUND) / (self.steps * step + searched + AROUND)


def kind_of(recipe: dict[str, Any]) -> str:
    """What a recipe, as plain data, saves."""
    skips = recipe.get("reuse", {}).get("kind", "none") != "none"
    dense = recipe.get("select", {}).get("kind", "dense") == "dense"
    return "cache" if skips and dense else "both" if skips else "sparse"


def has_means(recipe: dict[str, Any]) -> bool:
    """Whether blocks that a recipe, as plain data, leaves out count by their means."""
    compensate = recipe.get("compensate", {})
    return compensate.get("kind") == "residual" or bool(compensate.get("means"))


def searches_of(recipe: dict[str, Any]) -> int:
    """How many steps of a run search, of a recipe as plain data; not those that only choose anew."""
    if recipe.get("select", {}).get("kind") != "mass":
        return 0
    return max(1, len(recipe.get("schedule", {}).get("refresh_at", ())))


def rows_of(result: dict[str, Any]) -> list[Row]:
    """The most faithful row first.

    Raises:
        SystemExit: a row has its linear layers in 8 bits, of which no composed time is.
    """
    cast = [name for name in result["rows"] if "/" in name]
    if cast:
        raise SystemExit(
            f"Times of {', '.join(cast)} cannot be composed: those of a step are of 16-bit layers. Use --show."
        )
    rows = [Row.of(name, row, result["settings"]["steps"]) for name, row in result["rows"].items() if row["clips"]]
    return sorted(rows, key=lambda row: -row.metrics["psnr"].mean)


def size_of(settings: dict[str, Any]) -> str:
    """Pixels as a reader writes them: one number is both sides."""
    width, _, height = str(settings["size"]).partition("x")
    return f"{width} x {height or width}"


def table(result: dict[str, Any]) -> str:
    """Every row of one number of steps, with what its intervals are."""
    settings, rows = result["settings"], rows_of(result)
    if not rows:
        raise SystemExit("No clip was made yet.")
    counts = sorted({row.metrics["psnr"].count for row in rows})
    kinds = sorted({row.metrics["psnr"].kind for row in rows})
    clips = f"{counts[0]} clips" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} clips"
    facts = result["facts"]
    lines = [
        f"{settings['steps']} steps, {settings['frames']} frames of {size_of(settings)}, guidance "
        f"{settings['guidance']:g}, {settings['dtype']}, {facts.get('device', settings['device'])}, torch "
        f"{facts['torch']}; {clips} a row; in brackets the {' or '.join(kinds)} over clips.",
        "",
        "| what | row | computed | density | work | composed | PSNR, dB | SSIM | LPIPS | flicker |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            KINDS[row.kind],
            f"`{row.name}`",
            f"{row.computed:.2f}",
            f"{row.density:.3f}",
            f"{row.work:.3f}",
            f"{row.speedup:.2f}x",
            spelled(row.metrics["psnr"], 1),
            *(spelled(row.metrics.get(name), digits) for name, (_, digits) in SHOWN.items()),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spelled(interval: Interval | None, digits: int) -> str:
    """``36.0 (34.1 to 37.9)``; a dash where nothing was measured."""
    if interval is None:
        return "-"
    mean = f"{interval.mean:.{digits}f}"
    return mean if interval.count < 2 else f"{mean} ({interval.low:.{digits}f} to {interval.high:.{digits}f})"


def draw(results: Sequence[dict[str, Any]], picture: Path, card: dict[str, Any] | None = None) -> None:
    """PSNR against the composed time of a whole run, a panel for each number of steps; of a card against its own."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    number = len(results) + (card is not None)
    figure, panels = pyplot.subplots(1, number, figsize=(5.2 * number, 4.2), squeeze=False, sharey=True)
    colours = dict(zip(KINDS, ("#4477aa", "#ccbb44", "#aa3377"), strict=True))
    if card is not None:
        draw_card(panels[0][0], card, colours)
    for panel, result in zip(panels[0][number - len(results) :], results, strict=True):
        rows = rows_of(result)
        for kind, label in KINDS.items():
            some = sorted((row for row in rows if row.kind == kind), key=lambda row: row.speedup)
            psnr = [row.metrics["psnr"] for row in some]
            bars = [[one.mean - one.low for one in psnr], [one.high - one.mean for one in psnr]]
            if some:
                speeds, means = [row.speedup for row in some], [one.mean for one in psnr]
                panel.errorbar(speeds, means, bars, fmt="o", ms=4, lw=0.8, color=colours[kind], label=label)
        for number, (place, names) in enumerate(names_by_place(rows).items()):
            # Neighbours' names one above and one below.
            offset = (5, -11 if number % 2 else 4)
            panel.annotate(", ".join(names), place, offset, textcoords="offset points", fontsize=8)
        panel.set_title(f"{result['settings']['steps']} steps")
        panel.set_xlabel("whole run of Wan 2.1 1.3B, times faster, composed")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("PSNR to dense, dB")
    panels[0][-1].legend(frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130, bbox_inches="tight")
    pyplot.close(figure)


def draw_card(panel: Any, card: dict[str, Any], colours: dict[str, str]) -> None:
    """PSNR, with its range over clips, against the time of the same runs."""
    for number, row in enumerate(sorted(card["recipes"], key=lambda row: -row["metrics"]["psnr"]["mean"])):
        faster, psnr = row["speedup"]["median"], row["metrics"]["psnr"]
        bars = [[psnr["mean"] - psnr["low"]], [psnr["high"] - psnr["mean"]]]
        colour = colours["both" if row["computed_share"]["mean"] < 1 else "sparse"]
        panel.errorbar([faster], [psnr["mean"]], bars, fmt="o", ms=4, lw=0.8, color=colour)
        if row["recipe"] in NAMED_OF_CARD:
            offset = (5, -11 if number % 2 else 4)
            name = NAMED_OF_CARD[row["recipe"]]
            panel.annotate(name, (faster, psnr["mean"]), offset, textcoords="offset points", fontsize=8)
    panel.set_title(f"{card['sequence']['tokens']:,} tokens, {card['num_steps']} steps, measured")
    panel.margins(x=0.16)
    panel.set_xlabel("the same runs, times faster than dense")
    panel.grid(alpha=0.3)


def names_by_place(rows: Sequence[Row]) -> dict[tuple[float, float], list[str]]:
    """Names of the picture by speed-up and PSNR, the slowest first: rows that do the same are one point."""
    found: dict[tuple[float, float], list[str]] = {}
    for row in sorted(rows, key=lambda row: row.speedup):
        if row.name in NAMED:
            place = (round(row.speedup, 2), round(row.metrics["psnr"].mean, 1))
            found.setdefault(place, []).append(NAMED[row.name])
    return found


def page(text: str, results: Sequence[dict[str, Any]], link: str) -> str:
    """A page with its tables and its picture as these results are.

    Raises:
        SystemExit: the page has no place for them.
    """
    if BEGIN not in text or END not in text:
        raise SystemExit(f"The page lacks the lines {BEGIN.strip()} and {END.strip()}.")
    before, rest = text.split(BEGIN)
    commands = "".join(f"`{html.unescape(result['facts']['command'])}`\n\n" for result in results)
    body = (
        f"![PSNR against the time of a whole run]({link})\n\n"
        + "\n".join(table(result) for result in results)
        + f"\n{commands}"
    )
    return before + BEGIN + body + END + rest.split(END)[1]


def write_docs(files: Sequence[Path], to: Path, picture: Path, card: Path | None = None) -> None:
    """Tables and picture of these files, into a page; the picture begins with a card's runs."""
    results = sorted((json.loads(file.read_text()) for file in files), key=lambda one: one["settings"]["steps"])
    draw(results, picture, None if card is None else json.loads(card.read_text(encoding="utf-8")))
    link = picture.resolve().relative_to(to.resolve().parent).as_posix()
    to.write_text(page(to.read_text(encoding="utf-8"), results, link), encoding="utf-8")
