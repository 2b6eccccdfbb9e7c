"""The tables of docs/hardware.md, and that of cards in the README, from what ``benchmarks/cards.py`` compiled.

    python -m benchmarks.cards --representative --out benchmarks/results/cards.json
    python -m benchmarks.hardware_table [--check]

``--check`` writes nothing, and exits with 1 where the file says something else.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dit_accel.kernels.common.support import RUN_ON

from .card_list import CARDS, Card
from .cards import OPERATIONS, faults

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cards.json"
PAGE = ROOT / "docs" / "hardware.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- tables: benchmarks/hardware_table.py -->\n", "<!-- end of tables -->\n"
BEGIN_SHORT, END_SHORT = "<!-- cards: benchmarks/hardware_table.py -->\n", "<!-- end of cards -->\n"


def generations(rows: list[dict[str, Any]]) -> list[str]:
    """A row for each card: which kernel runs, and what is known of it."""
    lines = ["| architecture | generation | such as | kernel | known | shared memory |", "|---|---|---|---|---|---|"]
    for on in CARDS:
        here = [row for row in rows if row["card"] == on.name]
        kernel = (
            "Hopper's for blocks of 64 and 128 queries and head dims 64 and 128, else portable"
            if on.target == 90
            else "portable"
        )
        known = "**run and measured** (H100, H200)" if on.name in RUN_ON else "compiled only, untested"
        wrong = faults(here, on)
        fits = f"{on.shared_kib} KiB; {len(here)} kernels compiled, " + (f"{len(wrong)} faults" if wrong else "all fit")
        lines.append(f"| {on.name} | {on.generation} | {on.examples} | {kernel} | {known} | {fits} |")
    return lines


def short_table() -> str:
    """The README's: cards by who made them and what is known of them."""
    groups: dict[tuple[str, str, str], list[Card]] = {}
    for on in CARDS:
        maker = "AMD" if isinstance(on.target, str) else "NVIDIA"
        if on.name in RUN_ON:
            kernels, known = "kernels of its own", "measured"
        else:
            kernels, known = "portable Triton kernels", "compiled by the tests, not run yet"
        groups.setdefault((maker, kernels, known), []).append(on)
    lines = ["| card | attention runs on | state |", "|---|---|---|"]
    for (maker, kernels, known), cards in sorted(groups.items(), key=lambda one: one[0][2] != "measured"):
        names = dict.fromkeys(on.generation.partition(",")[0] for on in cards)
        examples = ", ".join(on.examples for on in cards)
        lines.append(f"| {maker} {', '.join(names)}: {examples} | {kernels} | {known} |")
    return "\n".join([*lines, "| CPU | PyTorch | measured |", ""])


def short_page(text: str) -> str:
    """The README with its table as it is now."""
    before, _, rest = text.partition(BEGIN_SHORT)
    return before + BEGIN_SHORT + short_table() + END_SHORT + rest.partition(END_SHORT)[2]


def figures(rows: list[dict[str, Any]]) -> list[str]:
    """A row for each kernel that was compiled."""
    lines = ["| architecture | call | kernel | warps | stages | tile | registers | shared, KiB | spilled, bytes |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        tiles = row["tiles"]
        tile = f"{tiles['TILE_Q']}x{tiles['TILE_K']}" if row["kernel"] in OPERATIONS else "-"
        call = row["call"].replace("torch.", "")
        cells = [row["card"], call, f"`{row['kernel']}`", row["warps"], row["stages"], tile, row["registers"]]
        cells += [f"{row['shared'] / 1024:.1f}", row["spills"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def page(text: str) -> str:
    """``text`` with the tables as they are now."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    tables = "\n".join([*generations(rows), "", "## Compiled", "", *figures(rows)])
    return f"{before}{BEGIN}\n{tables}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 where the page is not up to date"
    )
    asked = parser.parse_args()
    for file, make in ((PAGE, page), (README, short_page)):
        text = file.read_text(encoding="utf-8")
        if asked.check and make(text) != text:
            raise SystemExit(1)
        if not asked.check:
            file.write_text(make(text), encoding="utf-8")


if __name__ == "__main__":
    main()
