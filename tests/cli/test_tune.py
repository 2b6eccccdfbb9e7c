"""tune, and generate with the recipe that it wrote, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

from dit_accel import Recipe
from dit_accel.tuning import clips
from tests.cli.test_commands import run, run_json

SMALL = ["--size", "96x96", "--frames", "5", "--steps", "4"]
MODEL = ["random-wan", "--device", "cpu"]
ONE = ["--prompt", "a cat", "--set", "select.block=(32,32)", "--verify", "1"]


@pytest.fixture
def steady(monkeypatch):
    """A clock that counts blocks: what is skipped takes no time, and nothing else counts."""
    ran: list[int] = []
    forward = WanTransformerBlock.forward

    def counted(self, *args, **kwargs):
        ran.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(WanTransformerBlock, "forward", counted)
    monkeypatch.setattr(clips, "now", lambda _pipe: float(len(ran)))


def test_tune_and_generate(tmp_path, steady):
    folder = tmp_path / "deep" / "tuned"
    asked = ["tune", *MODEL, *SMALL, *ONE, "--out", str(folder)]
    data = run_json(*asked, "--target", "psnr=10")
    path = folder / "psnr-10.json"
    assert data["file"] == str(path)
    assert data["met"]
    assert data["found"]["measured"]
    assert data["found"]["fidelity"] >= 10.0
    recipe = Recipe.load(path)
    assert Recipe.from_dict(data["found"]["recipe"]) == recipe
    assert json.loads((folder / "front.json").read_text())["found"] == data["found"]
    clip = str(tmp_path / "cat.mp4")
    made = run_json("generate", *MODEL, *SMALL, "--recipe", str(path), "--prompt", "a cat", "--out", clip)
    assert Path(clip).exists()
    assert made["recipe"] == json.loads(json.dumps(recipe.to_dict()))
    # A second call goes on from the folder, as text.
    result = run(*asked, "--target", "psnr=10")
    assert result.exit_code == 0, result.stderr
    assert f"--recipe {path}" in result.stdout
    assert "dense" in result.stdout


def test_another_number_of_steps_is_refused_until_the_folder_is_left(tmp_path, steady):
    asked = ["tune", *MODEL, *ONE, "--out", str(tmp_path), "--target", "psnr=10"]
    assert run(*asked, *SMALL).exit_code == 0
    again = run(*asked, *SMALL[:-1], "5")
    assert again.exit_code == 2
    assert again.stderr.strip().splitlines()[-1].startswith(f"Error: {tmp_path / 'state.json'} is of another tuning: ")
    assert "num_inference_steps = 4, got 5" in again.stderr
    assert run(*asked, *SMALL[:-1], "5", "--start-over").exit_code == 0
    assert '"num_inference_steps": 5' in (tmp_path / "state.json").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target", "35"], "target must be NAME=VALUE, such as psnr=35 or speedup=2.5, got '35'."),
        (["--target", "vmaf=90"], "target must name one of psnr, ssim, lpips, speedup, got 'vmaf'."),
        (["--recipe", "auto"], "--recipe auto is chosen by the model; name a recipe with a density, such as mass."),
        (["--recipe", "sage"], "tune needs a recipe with a density to choose, got FullSelect."),
        (["--recipe", "fast"], "tune chooses the steps to compute, and this recipe has Listed."),
    ],
)
def test_what_cannot_be_is_said_before_the_model_is_loaded(options, words, tmp_path):
    result = run("tune", "no-such-model", *options, "--out", str(tmp_path / "tuned"))
    assert result.exit_code == 2
    assert result.stderr.strip() == f"Error: {words}"
    assert not (tmp_path / "tuned").exists()
