"""How the commands read a recipe: one syntax for all."""

from __future__ import annotations

from pathlib import Path

import pytest

from dit_accel import presets
from dit_accel.cli.options import read_recipe


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("pooled;select.density=0.1", None),
        (" pooled ; select.density = 0.1 ;", []),
        ("pooled", ["select.density=0.1"]),
        ("pooled;select.density=0.5", ["select.density=0.1"]),
    ],
)
def test_changes_after_semicolons_or_as_options(text: str, changes: list[str] | None) -> None:
    assert read_recipe(text, changes) == presets.pooled(density=0.1)


def test_of_a_file(tmp_path: Path) -> None:
    presets.window().save(tmp_path / "found.json")
    found = read_recipe(f"{tmp_path / 'found.json'};schedule.dense_fraction=0.5", None)
    assert found is not None
    assert found == presets.window().with_fields({"schedule.dense_fraction": 0.5})


def test_auto_alone_is_left_to_the_patch() -> None:
    assert read_recipe("auto", None) is None
    assert read_recipe("auto;", []) is None
    changed = {"schedule.dense_fraction": 0.5}
    assert read_recipe("auto;schedule.dense_fraction=0.5", None) == presets.automatic().with_fields(changed)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pooled;select.density", "must be AXIS.FIELD=VALUE, such as select.density=0.1, got 'select.density'"),
        ("pooled;select.densty=1", "no field 'densty'"),
        (";select.density=1", "Unknown recipe ''"),
    ],
)
def test_what_does_not_read(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_recipe(text, None)
