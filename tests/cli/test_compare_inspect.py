"""compare and inspect from the command line, on the built-in pipeline with random weights."""

from __future__ import annotations

import json

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
        "--recipe",
        "dense",
        "--prompt",
        "a cat",
        "--metrics",
        "psnr,latent_mse",
        "--out",
        str(tmp_path),
    )
    assert result.exit_code == 2
    assert "none named 'dense'" in result.stderr
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
    assert data["recipes"] == [RECIPE]
    assert data == json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "index.html").exists()


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
