"""compare and inspect from the command line, on the built-in pipeline with random weights."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

from dit_accel.cli.help import EXAMPLES
from dit_accel.quality.inspection import Inspection
from tests.cli.documented import documented_keys
from tests.cli.test_commands import SMALL, run

MODEL = ["random-wan", "--device", "cpu"]
RECIPE = "pooled;select.density=0.5;select.block=(32,32);schedule.dense_fraction=0.0"


def test_compare_writes_a_report(tmp_path):
    result = run(
        "compare",
        *MODEL,
        *SMALL,
        "--recipe",
        RECIPE,
        "--prompt",
        "a cat",
        "--metrics",
        "psnr,latent_mse",
        "--out",
        str(tmp_path),
        "--json",
    )
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert sorted(data) == sorted(documented_keys(["compare"]))
    assert data["recipes"] == [RECIPE]
    assert data == json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "index.html").exists()


def test_compare_of_dense_with_dense(tmp_path):
    """The tool measures itself: the same twice, in turns, under a patch that changes nothing."""
    asked = [*MODEL, *SMALL, "--recipe", "dense", "--prompt", "a cat", "--metrics", "psnr", "--repeat", "4"]
    result = run("compare", *asked, "--out", str(tmp_path), "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    found = data["summaries"][1]
    assert (found["recipe"], found["metrics"]["psnr"]["mean"]) == ("dense (patched)", "inf")
    # By chance alone all four runs of one side are the faster ones in one of 35 cases, and the range leaves 1 out.
    assert found["speedup"]["low"] <= 1.2
    assert found["speedup"]["high"] >= 1 / 1.2
    assert (found["speedup"]["count"], found["speedup"]["kind"]) == (4, "noise of the runs")
    assert all(len(clip["runs"]) == 4 for clip in data["results"])


def test_auto_is_the_patch_without_a_recipe(tmp_path):
    """A sequence too short to gain stays dense here too, as `generate` and a user's own patch(pipe) keep it."""
    asked = [*MODEL, *SMALL, "--prompt", "a cat", "--metrics", "psnr", "--out", str(tmp_path)]
    result = run("compare", *asked, "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert sorted(data) == sorted(documented_keys(["compare"]))
    assert data["recipes"] == ["auto"]
    assert data["descriptions"] == {"auto": "patch(pipe) without a recipe"}
    assert data["summaries"][1]["density"]["mean"] == 1
    assert any("too few to gain" in note for note in data["notes"])


def test_the_json_of_inspect_is_what_the_page_says():
    assert sorted(documented_keys(["inspect"])) == sorted(one.name for one in fields(Inspection))


def test_the_table_fits_80_columns(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    asked = [*MODEL, *SMALL, "--recipe", RECIPE, "--recipe", "auto", "--prompt", "a cat", "--prompt", "a dog"]
    result = run("compare", *asked, "--out", str(tmp_path))
    assert result.exit_code == 0, result.stderr
    table = [line for line in result.stdout.splitlines() if "│" in line or "┃" in line]
    assert table
    assert max(map(len, table)) <= 80
    assert "…" not in result.stdout
    data = json.loads((tmp_path / "report.json").read_text())
    found = data["summaries"][1]
    for name, digits in {"psnr": 2, "ssim": 4, "latent_mse": 5, "flicker": 3}.items():
        assert name in result.stdout
        assert f"{float(found['metrics'][name]['mean']):.{digits}f}" in result.stdout
        low, high = (float(found["metrics"][name][end]) for end in ("low", "high"))
        assert f"{low:.{digits}f} to {high:.{digits}f}" in result.stdout
    assert f"{found['speedup']['median']:.2f}x" in result.stdout
    said = " ".join(result.stdout.split())
    assert "extremes of 2 clips; fewer than 10 have no 95% interval" in said
    assert "each clip once dense and once under each recipe, in turns; patched anew for every run" in said
    assert "2 untimed steps of dense and of each recipe" in said


@pytest.mark.parametrize("columns", ["60", "80", "120"])
def test_help_shows_its_example_whole(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    text = " ".join(run("compare", "--help").stdout.split())
    assert EXAMPLES["compare"][0] in text
    assert "…" not in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "pooled", "--recipe", "pooled"], "--recipe must not repeat a recipe, got pooled, pooled"),
        (["--metrics", "fvd"], "unknown metric 'fvd'"),
        (["--out", "/proc/no"], "Cannot write in /proc/no"),
        (["--prompt", "a", "--prompt", "a"], "prompts must be a non-empty sequence without repeats"),
    ],
)
def test_refused_in_one_sentence(arguments, words):
    result = run("compare", *MODEL, *SMALL, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_inspect_writes_pictures(tmp_path):
    where = ["--at-step", "1", "--layer", "0", "--out", str(tmp_path)]
    changes = ["--set", "select.block=(32,32)", "--set", "schedule.dense_fraction=0.0"]
    result = run("inspect", *MODEL, *SMALL, "--prompt", "a cat", *where, *changes)
    assert result.exit_code == 0, result.stderr
    for order in ("raster", "tiles", "recipe"):
        assert f"{order}: 95% of the mass lies in" in result.stdout
        assert (tmp_path / f"maps_{order}_layer00.png").exists()


def test_a_recipe_that_does_not_read_is_one_sentence():
    result = run("compare", *MODEL, "--recipe", "pooled;select.densty=0.5")
    assert result.exit_code == 2
    assert "no field 'densty'" in result.stderr
    assert "Traceback" not in result.stderr
