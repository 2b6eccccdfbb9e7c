"""docs/hardware.md says what was compiled last, and of the calls that every run of the tests compiles."""

import json

from benchmarks.card_list import CARDS
from benchmarks.cards import REPRESENTATIVE, faults
from benchmarks.hardware_table import BEGIN, PAGE, README, RESULTS, page, short_page, short_table


def test_the_page_is_up_to_date():
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "run python -m benchmarks.hardware_table"


def test_the_readmes_cards_are_these():
    text = README.read_text(encoding="utf-8")
    assert short_page(text) == text, "run python -m benchmarks.hardware_table"
    rows = short_table().splitlines()
    assert all(any(one in row for row in rows) for on in CARDS for one in on.examples.split(", "))
    assert [row for row in rows if "H100" in row and "measured" in row]
    assert not [row for row in rows if "RTX" in row and "measured" in row]


def test_the_results_are_of_every_card_and_fit():
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    for on in CARDS:
        here = [row for row in rows if row["card"] == on.name]
        assert {row["call"] for row in here} >= set(REPRESENTATIVE[on.name])
        assert not faults(here, on)


def test_another_result_changes_the_page(tmp_path, monkeypatch):
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows[0]["registers"] += 1
    changed = tmp_path / "cards.json"
    changed.write_text(json.dumps(rows), encoding="utf-8")
    monkeypatch.setattr("benchmarks.hardware_table.RESULTS", changed)
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) != text
    assert page(text).startswith(text.split(BEGIN)[0])
