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
from dit_accel.quality.card import HEAD, card_rows, read_card

OURS = sorted(CARDS.glob("*.json"))


def test_the_page_is_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "run python -m benchmarks.models_table --write"


@pytest.fixture
def card() -> dict[str, Any]:
    return read_card(OURS[0])


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
    for row, recipe in zip(card_rows(card), card["recipes"], strict=True):
        assert len(re.findall(r"(?<!\\)\|", row)) == len(re.findall(r"(?<!\\)\|", HEAD))
        assert f"{recipe['speedup']['median']:.2f} ({recipe['speedup']['low']:.2f} to " in row
        assert f"{card['dense']['total_seconds']['median']:.2f} |" in row
        assert f"{recipe['metrics']['psnr']['mean']:.2f} (" in row
        assert f"{recipe['density']['mean']:.3f}" in row
    assert f"{card['sequence']['latent_tokens']:,} tokens" in card_rows(card)[0]


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
    (tmp_path / "odd.json").write_text("{}")
    with pytest.raises(ValueError, match=r"odd\.json is not a card of dit-accel verify"):
        tables(tmp_path)


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_our_cards_hold_no_pictures_and_no_paths(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert '"clip": null' in text
    assert not re.search(r"/(work|tmp|home|root)/", text)
