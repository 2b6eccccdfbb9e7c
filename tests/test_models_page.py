"""docs/models.md shows the cards that there are, ours first, and nothing that a sender wrote breaks its table."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import models_table
from benchmarks.models_table import BEGIN, CARDS, END, PAGE, page, table, tables
from dit_accel.quality.card import HEAD, card_rows
from tests.quality import cards

OURS = sorted(CARDS.glob("*.json"))


def test_the_page_is_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "run python -m benchmarks.models_table --write"


@pytest.fixture
def card() -> dict[str, Any]:
    return cards.card()


def test_without_cards_the_page_says_so(tmp_path: Path) -> None:
    assert tables(tmp_path).count("None so far.") == 2


def test_a_card_that_is_sent_stands_behind_ours(card: dict[str, Any], tmp_path: Path) -> None:
    theirs = copy.deepcopy(card) | {"model": "org/theirs"}
    for path, one in ((tmp_path / "ours.json", card), (tmp_path / "sent" / "theirs.json", theirs)):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(one), encoding="utf-8")
    ours, sent = tables(tmp_path).split("### Sent by others")
    assert card_rows(card)[0] in ours
    assert card_rows(theirs)[0] in sent
    assert "org/theirs" not in ours


def test_another_card_changes_the_page(card: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card["recipes"][0]["speedup"]["median"] += 1
    (tmp_path / "card.json").write_text(json.dumps(card), encoding="utf-8")
    monkeypatch.setattr(models_table, "CARDS", tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) != text
    assert page(text).startswith(text.split(BEGIN)[0])
    assert page(text).endswith(text.split(END)[1])


def test_a_row_says_what_the_card_says(card: dict[str, Any]) -> None:
    (row,) = card_rows(card)
    assert row == (
        r"| org/model | 80 x 48 x 5, 1,920 tokens, 30 steps, bfloat16, compiled, 2 clips | NVIDIA H0 | fast | 11.00 "
        r"| 5.00 | 2.25 (1.50 to 3.38) | 35.00 (30.00 to 40.00) | 0.9000 (0.9000 to 0.9000) | - "
        r"| 1.500 (1.500 to 1.500) | 0.420, 13 of 30 |"
    )
    (recipe,) = card["recipes"]
    assert recipe["dense_calls"] == {"first steps": 24}
    assert recipe["missing"] == {"lpips": ["LPIPS needs weights."]}
    assert recipe["stages"]["steps"]["median"] == 3.5
    assert (recipe["sparse_density"], recipe["density"]["mean"]) == (0.25, 0.42)
    assert card["dense"]["stages"]["decode"]["median"] == 1.0


def test_random_weights_have_no_fidelity(card: dict[str, Any]) -> None:
    cells = card_rows(card | {"random_weights": True})[0].split(" | ")
    assert cells[0] == "| org/model (random weights)"
    assert cells[7:11] == ["-"] * 4


def test_what_a_sender_writes_breaks_no_table(card: dict[str, Any]) -> None:
    card |= {"model": "a|b\n| c | [x](http://y) <script>`*_", "note": "two\nlines | <b>"}
    rows = table([card])
    assert all("<" not in row for row in rows)
    row = next(row for row in rows if "script" in row)
    assert len(re.findall(r"(?<!\\)\|", row)) == len(re.findall(r"(?<!\\)\|", HEAD))
    assert "[x]" not in row.replace(r"\[", "").replace(r"\]", "")


def test_identical_clips_and_missing_metrics_are_said(card: dict[str, Any]) -> None:
    recipe = card["recipes"][0]
    recipe["metrics"]["psnr"] = {
        "mean": "inf",
        "median": "inf",
        "low": 40.0,
        "high": "inf",
        "count": 3,
        "kind": "range",
    }
    del recipe["metrics"]["ssim"]
    cells = card_rows(card)[0].split(" | ")
    assert cells[7:9] == ["inf (40.00 to inf)", "-"]


def test_a_file_that_is_no_card_is_named(tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"odd\.json is not a card of dit-accel verify"):
        tables(tmp_path)


@pytest.mark.parametrize("path", [None, *OURS], ids=lambda path: path.stem if path else "made up")
def test_our_cards_hold_no_pictures_and_no_paths(path: Path | None) -> None:
    text = json.dumps(cards.card()) if path is None else path.read_text(encoding="utf-8")
    assert '"clip": null' in text
    assert not re.search(r"/(work|tmp|home|root)/", text)
