"""The rows of the table of presets, and how two rankings are compared."""

from __future__ import annotations

import json
import math
import random
import sys

import pytest

from benchmarks import verify_presets
from benchmarks.fidelity_presets import at_density
from benchmarks.rank_agreement import agreement, small_ranking, spearman
from benchmarks.verify_rows import REFRESH, all_methods, refresh_name, rows_of
from dit_accel import Recipe
from dit_accel.presets import PRESETS


def _by_definition(first: list[float], second: list[float]) -> float:
    """1 - 6 sum d^2 / (n (n^2 - 1)), which holds without ties."""
    ranks = [[sorted(side).index(value) for value in side] for side in (first, second)]
    n = len(first)
    return 1 - 6 * sum((a - b) ** 2 for a, b in zip(*ranks, strict=True)) / (n * (n**2 - 1))


@pytest.mark.parametrize("count", [4, 7, 20])
def test_spearman_is_its_definition(count: int) -> None:
    drawn = random.Random(count)
    first, second = ([drawn.random() for _ in range(count)] for _ in range(2))
    assert spearman(first, second) == pytest.approx(_by_definition(first, second))
    assert spearman(first, [math.exp(value) for value in first]) == pytest.approx(1)
    assert spearman(first, [-value for value in first]) == pytest.approx(-1)


def test_ties_share_their_rank() -> None:
    # Ranks 1, 2.5, 2.5, 4 beside 1, 2, 3, 4: 4.5 over the root of 4.5 x 5.
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_only_what_both_models_have_counts() -> None:
    here = {"mass": 43.0, "pooled": 38.0, "psa": 30.0, "na": 16.0, "ear": 99.0}
    small = {"mass": 40.0, "pooled": 35.0, "psa": 31.0, "na": 20.0, "sta": 1.0}
    found = agreement(here, small)
    assert found is not None
    assert (found.count, found.correlation) == (4, pytest.approx(1))
    assert found.low <= found.correlation <= found.high + 1e-12
    turned = agreement(here, {name: -value for name, value in small.items()})
    assert turned is not None
    assert turned.correlation == pytest.approx(-1)
    assert agreement(here, {"mass": 1.0, "pooled": 2.0, "na": 3.0}) is None
    assert agreement(here, dict.fromkeys(here, 30.0)) is None


def test_noise_widens_the_interval() -> None:
    drawn = random.Random(0)
    true = {str(n): float(n) for n in range(20)}
    noisy = {name: value + drawn.gauss(0, 8) for name, value in true.items()}
    same, far = agreement(true, true), agreement(true, noisy)
    assert same is not None
    assert far is not None
    assert far.high - far.low > same.high - same.low + 0.05


def test_the_small_model_is_read_by_density(tmp_path) -> None:
    row = {"method": "mass", "asked_density": 0.3, "metrics": {"psnr": {"mean": 43.35}}}
    rows = [row, {**row, "asked_density": None}, {**row, "method": "broken", "metrics": {}}]
    path = tmp_path / "small.json"
    path.write_text(json.dumps({"rows": rows}))
    later = tmp_path / "later.json"
    later.write_text(json.dumps({"rows": [{**row, "metrics": {"psnr": {"mean": "inf"}}}]}))
    assert small_ranking([path]) == {0.3: {"mass": 43.35}}
    assert small_ranking([path, later]) == {0.3: {"mass": math.inf}}


def test_every_preset_and_profile_has_rows() -> None:
    rows = rows_of(list(all_methods()), [0.3, 0.2, 0.1])
    assert {row.method.name for row in rows} >= set(PRESETS) - {"dense"}
    assert len({row.name for row in rows}) == len(rows)
    assert [row.density for row in rows if row.method.name == "mass"] == [0.3, 0.2, 0.1]
    assert [row.density for row in rows if row.method.name == "fast"] == [None]
    ages = [row for row in rows if row.method.name.startswith("plan-")]
    assert [row.name for row in ages] == [f"{refresh_name(age)}@0.3" for age in REFRESH]
    schedules = [row.method.build(0.3).schedule.refresh_every for row in ages]
    assert schedules == list(REFRESH)
    with pytest.raises(ValueError, match="Unknown method 'swift'"):
        rows_of(["swift"], [0.3])


def test_a_file_has_whole_recipes_and_further_prompts_take_them(tmp_path, monkeypatch) -> None:
    """The command as it is given, in this process: prepared, run, merged, and gone on with other prompts."""

    def run(*arguments: str) -> None:
        given = ["--quick", "--device", "cpu", "--dtype", "float32", "--methods", "mass", "--densities", "0.3"]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["verify_presets", *given, "--metrics", "psnr", *arguments])
            patch.setattr(verify_presets, "launch", lambda _args, *what: run(*arguments, "--share", "0", *what))
            verify_presets.main()

    first, more = tmp_path / "first", tmp_path / "more"
    run("--prompts", "1", "--out", str(first))
    (row,) = json.loads((first / "table.json").read_text())["rows"]
    assert row["row"] == "mass@0.3"
    assert Recipe.from_dict(row["recipe"]) == at_density(all_methods()["mass"], 0.3, [])
    assert (row["clips"], list(row["metrics"])) == (1, ["psnr"])

    monkeypatch.setattr(verify_presets, "at_density", lambda *_: pytest.fail("fitted anew"))
    further = ("--first", "1", "--prompts", "2", "--like", str(first / "table.json"), "--out", str(more))
    run(*further, "--prepare")
    assert not (more / "table.json").exists()
    run(*further)
    (again,) = json.loads((more / "table.json").read_text())["rows"]
    assert again["recipe"] == row["recipe"]
    assert [clip["seed"] for clip in again["each"]] == [1]
