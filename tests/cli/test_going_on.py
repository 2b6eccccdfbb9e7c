"""compare, inspect and search: interrupted, each goes on, and gives what a run in one piece gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dit_accel.parts import Parts
from dit_accel.quality import inspect_pipeline
from tests.cli.test_commands import run

TINY = ["--size", "64x64", "--frames", "5", "--steps", "2"]
MODEL = ["random-wan", "--device", "cpu", "--dtype", "fp32"]
BLOCKS = ["--set", "select.block=(16,16)"]
COMPARE = [
    "compare", *MODEL, *TINY, "--prompt", "a cat", "--prompt", "a dog", "--metrics", "psnr,latent_mse", "--recipe",
    "pooled;select.block=(16,16);select.density=0.5;schedule.dense_fraction=0.0",
]  # fmt: skip
INSPECT = ["inspect", *MODEL, *TINY, *BLOCKS, "--prompt", "a cat", "--layer", "0", "--layer", "2"]
ONE = ["--prompt", "a cat", "--samples", "1"]
SEARCH = ["search", *MODEL, *TINY, *BLOCKS, *ONE, "--density", "0.6"]
RULES = [
    "search", *MODEL, *TINY, *BLOCKS, "--set", "order.shape=(2,2,4)", "--prompt", "a cat", "--prompt", "a dog",
    "--samples", "1", "--rules", "--density", "0.7",
]  # fmt: skip


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Names of the parts that are written; behind the last that is allowed the run is interrupted."""
    state: dict[str, Any] = {"allowed": 1000, "names": []}
    write, write_observations = Parts.write, inspect_pipeline.write_observations

    def after(name: str) -> None:
        state["names"].append(name)
        if len(state["names"]) >= state["allowed"]:
            raise KeyboardInterrupt

    def counted(self: Parts, name: str, data: Any) -> None:
        write(self, name, data)
        after(name)

    def counted_observations(observations: Any, path: Path) -> None:
        write_observations(observations, path)
        after(path.stem)

    monkeypatch.setattr(Parts, "write", counted)
    monkeypatch.setattr(inspect_pipeline, "write_observations", counted_observations)
    return state


def _without_times(report: dict[str, Any]) -> list[Any]:
    return [(one["recipe"], one["prompt"], one["density"], one["metrics"], one["ran"]) for one in report["results"]]


@pytest.mark.parametrize(
    ("command", "result", "parts"),
    [(COMPARE, "report.json", 2), (INSPECT, "patterns.json", 4), (SEARCH, "found.json", 3), (RULES, "found.json", 2)],
    ids=["compare", "inspect", "search", "search --rules"],
)
def test_it_goes_on(command: list[str], result: str, parts: int, tmp_path: Path, kept: dict[str, Any]) -> None:
    def asked(folder: str) -> list[str]:
        is_file = command[0] == "search"
        return [*command, "--out", str(tmp_path / folder / result if is_file else tmp_path / folder)]

    assert run(*asked("whole")).exit_code == 0
    names = kept["names"]
    assert len(names) == parts
    kept |= {"allowed": 1, "names": []}
    assert run(*asked("broken")).exit_code == 130
    kept |= {"allowed": 1000, "names": []}
    again = run(*asked("broken"))
    assert again.exit_code == 0, again.stderr
    assert kept["names"] == names[1:]  # what was finished is not made again
    whole, broken = (json.loads((tmp_path / folder / result).read_text()) for folder in ("whole", "broken"))
    if command is COMPARE:
        assert _without_times(whole) == _without_times(broken)
        assert len(whole["results"]) == 4
    else:
        assert whole == broken
    # What a run goes on from is gone where it takes room and the result has all of it.
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name == "parts"]
    assert len(left) == (2 * parts if command is COMPARE else 0)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("command", "more", "words"),
    [
        (COMPARE, ["--seed", "1"], "seeds.0 = 0, got 1"),
        (INSPECT, ["--seed", "1"], "seed = 0, got 1"),
        (SEARCH, ["--seed", "1"], "seed = 0, got 1"),
        (RULES, ["--set", "select.block=(32,16)"], "recipe.select.block"),
    ],
    ids=["compare", "inspect", "search", "search --rules"],
)
def test_parts_of_other_settings_are_refused_until_it_starts_over(
    command: list[str], more: list[str], words: str, tmp_path: Path, kept: dict[str, Any]
) -> None:
    asked = [*command, "--out", str(tmp_path / "found.json" if command[0] == "search" else tmp_path / "folder")]
    kept["allowed"] = 1
    assert run(*asked).exit_code == 130
    refused = run(*asked, *more)
    assert refused.exit_code == 2
    assert words in refused.stderr
    assert "--start-over" in refused.stderr
    assert "Traceback" not in refused.stderr
    kept |= {"allowed": 1, "names": []}
    assert run(*asked, *more, "--start-over").exit_code == 130  # at its own first part
    assert len(kept["names"]) == 1


def test_another_target_goes_on_with_what_was_measured(tmp_path: Path, kept: dict[str, Any]) -> None:
    """Errors of heads do not depend on the density that is wanted, as long as it is above the probe."""
    path = tmp_path / "found.json"
    kept["allowed"] = 2
    assert run(*SEARCH, "--out", str(path)).exit_code == 130
    kept |= {"allowed": 1000, "names": []}
    assert run(*SEARCH[:-1], "0.8", "--out", str(path)).exit_code == 0
    assert kept["names"] == ["layer-002"]
    whole = tmp_path / "whole.json"
    assert run(*SEARCH[:-1], "0.8", "--out", str(whole)).exit_code == 0
    assert path.read_bytes() == whole.read_bytes()
