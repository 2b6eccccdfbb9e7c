"""search, and generate with what it wrote, from the command line."""

from __future__ import annotations

import pytest

from dit_accel import Recipe, patch
from tests.cli.test_commands import SMALL, run, run_json
from tests.tiny import TINY

MODEL = ["random-wan", "--device", "cpu"]
BLOCKS = ["--set", "select.block=(32,32)"]
ONE = ["--prompt", "a cat", "--samples", "1"]


def test_search_and_generate(tmp_path):
    path = tmp_path / "deep" / "found.json"
    asked = ["--density", "0.6", "--order", "fhw", "--order", "tiles", "--order", "whf"]
    data = run_json("search", *MODEL, *SMALL, *BLOCKS, *ONE, *asked, "--out", str(path))
    recipe = Recipe.load(path)
    assert Recipe.from_dict(data["recipe"]) == recipe
    shares = recipe.select.head_densities
    layers, heads = len(shares), len(shares[0])
    assert len({share for layer in shares for share in layer}) > 1
    assert sum(data["orders"].values()) == layers * heads
    assert {name for layer in recipe.order.axes for name in layer} <= {"fhw", "tiles", "whf"}
    assert data["density"] == pytest.approx(0.6, abs=1e-4)
    assert 0 < data["predicted_error"] <= data["predicted_error_uniform"]
    clip = str(tmp_path / "cat.mp4")
    made = run_json("generate", *MODEL, *SMALL, "--recipe", str(path), "--prompt", "a cat", "--out", clip)
    assert made["summary"]["sparse_calls"] > 0
    assert made["summary"]["density"] == pytest.approx(0.6, abs=0.15)


def test_search_for_rules_and_generate(tmp_path):
    path = tmp_path / "rules.json"
    blocks = ["--set", "select.block=(16,16)", "--set", "order.shape=(2,2,4)"]
    data = run_json("search", *MODEL, *SMALL, *blocks, *ONE, "--rules", "--density", "0.6", "--out", str(path))
    recipe = Recipe.load(path)
    assert Recipe.from_dict(data["recipe"]) == recipe
    assert sum(data["heads"].values()) == sum(map(len, recipe.select.rules))
    assert data["density"] <= 0.6
    assert data["error"] <= data["error_single"]
    with patch(TINY["wan"].build(2), str(path)) as handle:
        assert handle.recipe == recipe


def test_an_error_bound_as_text(tmp_path):
    path = tmp_path / "found.json"
    result = run("search", *MODEL, *SMALL, *BLOCKS, *ONE, "--max-error", "0.01", "--out", str(path))
    assert result.exit_code == 0, result.stderr
    assert "predicted error of the velocity 0.0100" in result.stdout
    # The model is patched for each density.
    assert result.stderr.count("The recipe may be slower than dense here") == 1
    assert str(path) in result.stdout
    with patch(TINY["wan"].build(2), str(path)) as handle:
        assert handle.recipe == Recipe.load(path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--density", "0.3", "--max-error", "0.1"], "--density or --max-error is the target"),
        ([], "--density or --max-error is the target"),
        (["--density", "0.3", "--recipe", "auto"], "name a recipe"),
        (["--density", "0.3", "--recipe", "na"], "has no density per head"),
        (["--density", "0.3", "--out", "found.safetensors"], "--out must end in .json"),
        (["--density", "1.3"], "mean_density must lie in (0, 1]"),
        ([*BLOCKS, "--density", "0.6", "--order", "xyz"], "order.axes must hold fhw"),
        (["--density", "0.3", "--recipe", "nowhere.json"], "There is no recipe file nowhere.json"),
        (["--rules", "--max-error", "0.1"], "--rules goes with --density and without --order"),
        (["--rules", "--density", "0.3", "--order", "fhw"], "--rules goes with --density and without --order"),
        (["--density", "0.3", "--transformer", "transformer"], "--transformer goes with --rules"),
    ],
)
def test_bad_requests_are_sentences(arguments, words):
    result = run("search", *MODEL, *SMALL, *ONE, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
