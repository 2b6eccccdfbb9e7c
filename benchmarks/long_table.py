"""Seconds and fidelity of the same clips at real length, as one table of docs/fidelity.md.

    python -m benchmarks.long_table                          # show it
    python -m benchmarks.long_table --write                  # put it into the page
    python -m benchmarks.long_table card.json table.json     # of files of your own

Files are cards of ``dit-accel verify`` and tables of ``benchmarks/verify_presets.py``. A table is of one model, size,
number of steps and machine: files of another one are refused, as are seconds of processes that shared a GPU. Ours are
benchmarks/results/cards/embedded-long-*.json; of every preset ``benchmarks/presets_table.py`` makes a table.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel.quality.bootstrap import FEWEST_CLIPS
from dit_accel.quality.card import FORMAT, beside, escaped, interval_text, read_card
from dit_accel.quality.metrics import METRICS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "fidelity.md"
BEGIN, END = "<!-- long: benchmarks/long_table.py -->\n", "<!-- end of long -->\n"
SHOWN = ("psnr", "ssim", "lpips", "flicker")
HEADS = ("recipe", "density", "steps computed", "dense, s", "seconds", "times as fast", "PSNR, dB", "SSIM", "LPIPS",
         "flicker")  # fmt: skip
# A folder of the one who ran it helps no reader.
OUT = re.compile(r" --out[ =]\S+")


@dataclass(frozen=True)
class Run:
    """What all rows of a table have in common."""

    model: str
    size: tuple[int, int, int]
    tokens: int | None
    steps: int | None
    guidance: float | None
    dtype: str
    compiled: bool
    clips: int
    device: str
    torch: str
    beside: tuple[str, ...] = ()

    def __str__(self) -> str:
        frames, height, width = self.size
        tokens = "" if self.tokens is None else f" ({self.tokens:,} tokens)"
        steps = "steps unknown" if self.steps is None else f"{self.steps} steps"
        guidance = "" if self.guidance is None else f", guidance {self.guidance:g}"
        return (
            f"{self.model}, {frames} frame{'s' * (frames != 1)} of {width} x {height}{tokens}, {steps}{guidance}, "
            f"{self.dtype}, {'compiled' if self.compiled else 'eager'}, {self.clips} clip{'s' * (self.clips != 1)}, "
            f"{self.device}, torch {self.torch}" + "".join(f"; accelerated side: {what}" for what in self.beside)
        )


@dataclass(frozen=True)
class Row:
    """One recipe: intervals as :meth:`~dit_accel.quality.bootstrap.Interval.to_json` gives them.

    Attributes:
        name: of the recipe, in one file.
        summary: of its clips, with ``density``, ``computed_share``, ``total_seconds``, ``speedup``, ``metrics``.
        dense_seconds: of the dense runs that it took turns with.
        fvd: to the dense clips, where it was measured.
    """

    name: str
    summary: Mapping[str, Any]
    dense_seconds: Mapping[str, Any]
    fvd: float | None = None

    @property
    def psnr(self) -> float:
        found = self.summary["metrics"].get("psnr")
        return float("-inf") if found is None else float(found["mean"])

    def cells(self, steps: int | None) -> list[str]:
        """Under :data:`HEADS`."""
        density, share = self.summary["density"], self.summary["computed_share"]
        return [
            f"`{_plain(self.name)}`",
            "-" if density is None else f"{density['mean']:.3f}",
            "-" if share is None or steps is None else f"{steps * share['mean']:.0f} of {steps}",
            f"{self.dense_seconds['median']:.2f}",
            f"{self.summary['total_seconds']['median']:.2f}",
            interval_text(self.summary["speedup"], 2, "median"),
            *(self._metric(name) for name in SHOWN),
        ]

    def _metric(self, name: str) -> str:
        found = self.summary["metrics"].get(name)
        return "-" if found is None else interval_text(found, METRICS[name].digits, "mean")


@dataclass(frozen=True)
class Source:
    """What one file holds."""

    run: Run
    command: str
    rows: tuple[Row, ...]


class Refused(ValueError):
    """What a file holds cannot stand in the table; the message names the file."""


def read(path: Path) -> Source:
    """A card or a table, of which :func:`table` can be made.

    Raises:
        ValueError: it is neither, its weights are random, or its seconds are of processes that shared a GPU.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        source = _of_card(path) if data.get("format") == FORMAT else _of_table(path, data)
        table([source])
    except Refused:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"{path} is neither a card nor a table of presets: {error!r}.") from error
    return source


def _of_card(path: Path) -> Source:
    card = read_card(path)
    if card["random_weights"]:
        raise Refused(f"{path} is of random weights, whose fidelity means nothing.")
    sequence = card["sequence"]
    run = Run(
        card["model"],
        (card["frames"], card["height"], card["width"]),
        None if sequence is None else sequence["latent_tokens"],
        card["num_steps"],
        card["settings"]["call"].get("guidance_scale"),
        card["settings"]["dtype"],
        card["settings"]["compiled"],
        card["clips"],
        card["device"]["name"],
        card["versions"]["torch"],
        tuple(beside(card)),
    )
    dense = card["dense"]["total_seconds"]
    return Source(run, card["command"], tuple(Row(one["recipe"], one, dense) for one in card["recipes"]))


def _of_table(path: Path, table: Mapping[str, Any]) -> Source:
    facts, rows = table["facts"], table["rows"]
    settings, sequence = facts["settings"], facts["sequence"]
    if facts["processes_on_a_gpu"] != 1:
        raise Refused(f"{path} has seconds of {facts['processes_on_a_gpu']} processes on one GPU, which say nothing.")
    frames, height, width = rows[0]["each"][0]["shape"]
    run = Run(
        settings["model"],
        (frames, height, width),
        None if sequence is None else sequence["latent_tokens"],
        settings["steps"],
        facts["call"].get("guidance_scale"),
        settings["dtype"],
        settings["compile"],
        facts["prompts"],
        facts["device"]["name"],
        facts["versions"]["torch"],
        tuple(beside({"settings": settings})),
    )
    return Source(run, facts["command"], tuple(Row(row["row"], row, row["dense_seconds"], row["fvd"]) for row in rows))


def table(sources: Sequence[Source]) -> str:
    """The run, the commands, and the rows of all files, the nearest to dense first.

    Raises:
        ValueError: files of different runs.
    """
    if not sources:
        return "Not measured yet."
    for source in sources[1:]:
        if source.run != sources[0].run:
            raise ValueError(f"one table is of one run, got {sources[0].run} and {source.run}.")
    run = sources[0].run
    commands = list(dict.fromkeys(_plain(OUT.sub("", source.command)) for source in sources))
    rows = [(row, number) for number, source in enumerate(sources, start=1) for row in source.rows]
    rows.sort(key=lambda found: -found[0].psnr)
    has_fvd, several = any(row.fvd is not None for row, _ in rows), len(commands) > 1
    heads = [*HEADS, *(["FVD"] if has_fvd else []), *(["command"] if several else [])]
    lines = [_line(heads), "|" + "---|" * len(heads)]
    for row, number in rows:
        fvd = [] if not has_fvd else ["-" if row.fvd is None else f"{row.fvd:.1f}"]
        lines.append(_line([*row.cells(run.steps), *fvd, *([str(number)] if several else [])]))
    ends = "95 % over clips" if run.clips >= FEWEST_CLIPS else "the range over clips, of times the noise of the runs"
    return "\n".join([f"{escaped(str(run))}. In brackets {ends}.", "", "```", *commands, "```", "", *lines])


def _plain(text: str) -> str:
    """Text within backticks, whoever wrote it: of one line, and not their end."""
    return " ".join(text.split()).replace("`", "'")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def ours() -> list[Path]:
    """The files that the page shows."""
    return sorted((RESULTS / "cards").glob("embedded-long-*.json"))


def page(text: str) -> str:
    """``text`` with the table as it is now."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{table([read(path) for path in ours()])}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="show the table of these; default: ours")
    parser.add_argument("--write", action="store_true", help="put ours into docs/fidelity.md")
    asked = parser.parse_args()
    if asked.write and asked.files:
        parser.error("--write puts ours into the page: copy your files to benchmarks/results first")
    try:
        if asked.write:
            PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        else:
            print(table([read(path) for path in asked.files or ours()]))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
