"""Finished parts in a folder: whose they are, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dit_accel.parts import RECORD, Parts

SETTINGS = {"model": "a", "recipes": {"fast": {"select": {"density": 0.3}}}, "seeds": (0, 1)}


def test_parts_are_found_again(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "deep" / "folder")
    parts.claim(SETTINGS)
    assert parts.count() == 0
    assert parts.read("0000") is None
    parts.write("0000", {"psnr": "inf", "prompt": "猫"})
    again = Parts(parts.folder)
    again.claim(dict(reversed(SETTINGS.items())))  # the order of names says nothing
    assert again.read("0000") == {"psnr": "inf", "prompt": "猫"}
    assert again.count() == 1


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    parts.claim(SETTINGS)
    parts.write("0000", 1)
    changed = SETTINGS | {"recipes": {"fast": {"select": {"density": 0.2}}}}
    with pytest.raises(ValueError, match=r"recipes\.fast\.select\.density = 0\.3, got 0\.2; give another folder"):
        parts.claim(changed)
    assert not parts.is_of(changed)
    assert parts.is_of(SETTINGS)
    assert parts.read("0000") == 1
    parts.forget()
    parts.claim(changed)
    assert parts.count() == 0


def test_a_second_record_is_claimed_later(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    parts.claim(SETTINGS)
    parts.claim({"weights": "x"}, (), "pipeline.json")
    with pytest.raises(ValueError, match="weights = 'x', got 'y'"):
        parts.claim({"weights": "y"}, (), "pipeline.json")
    parts.forget("pipeline.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("record", [None, "{", "[1]"])
def test_parts_of_nobody_knows_what_are_refused(tmp_path: Path, record: str | None) -> None:
    Parts(tmp_path).write("0000", 1)
    if record is not None:
        (tmp_path / RECORD).write_text(record)
    with pytest.raises(ValueError, match=r"is there already|holds outputs made with"):
        Parts(tmp_path).claim(SETTINGS)
    assert Parts(tmp_path).read("0000") == 1


def test_forgetting_leaves_other_files(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    parts.claim(SETTINGS)
    parts.write("0000", 1)
    (tmp_path / "mine.txt").write_text("mine")
    parts.forget()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    parts.write("0000", 1)
    parts.path("0000").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"0000\.json is damaged .*; delete it, or give another folder"):
        parts.read("0000")


def test_a_draft_is_no_part(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    parts.write("0000", 1)
    parts.path(".dit_accel-0a").write_text("1")
    assert parts.count() == 1
    with pytest.raises(ValueError):
        parts.write("0001", float("nan"))
    assert parts.count() == 1
    assert json.loads(parts.path("0000").read_text()) == 1
