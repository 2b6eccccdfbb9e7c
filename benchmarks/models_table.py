"""The tables of docs/models.md, from the cards of ``dit-accel verify``.

    python -m benchmarks.models_table                # show them
    python -m benchmarks.models_table --write        # put them into the page
    python -m benchmarks.models_table outputs        # of the cards anywhere below a folder of yours

Ours are in benchmarks/results/cards, those that others sent in benchmarks/results/cards/sent.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_accel.quality.card import HEAD, card_rows, escaped, read_card

ROOT = Path(__file__).parent.parent
CARDS = ROOT / "benchmarks" / "results" / "cards"
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- tables: benchmarks/models_table.py -->\n", "<!-- end of tables -->\n"
RULE = "|" + "---|" * HEAD.count(" |")


def table(cards: Sequence[dict[str, Any]]) -> list[str]:
    """A row for each recipe of each card, then what their senders say."""
    if not cards:
        return ["None so far."]
    rows = [row for card in cards for row in card_rows(card)]
    said = [(card["model"], card["device"]["name"], card["note"]) for card in cards if card["note"]]
    notes = [f"- {escaped(model)} on {escaped(machine)}: {escaped(note)}" for model, machine, note in said]
    return [HEAD, RULE, *rows, *(["", *notes] if notes else [])]


def tables(folder: Path) -> str:
    """Both tables.

    Raises:
        ValueError: a file that is no card; the message names it.
    """
    ours, sent = ([read_card(path) for path in sorted(place.glob("*.json"))] for place in (folder, folder / "sent"))
    return "\n".join(["### Ours", "", *table(ours), "", "### Sent by others", "", *table(sent)])


def page(text: str) -> str:
    """``text`` with the tables as they are now."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{tables(CARDS)}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="show the cards (card.json) below this folder")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/models.md")
    asked = parser.parse_args()
    if asked.folder is not None:
        print("\n".join(table([read_card(path) for path in sorted(asked.folder.rglob("card.json"))])))
    elif asked.write:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(tables(CARDS))


if __name__ == "__main__":
    main()
