"""calibrate, and generate with what it wrote, from the command line."""

from __future__ import annotations

from dit_accel import CalibrationArtifact
from tests.cli.test_commands import SMALL, run, run_json

MODEL = ["random-wan", "--device", "cpu"]
RECIPE = ["--recipe", "paro", "--set", "select.density=0.5", "--set", "select.block=(32,32)"]


def test_calibrate_and_generate(tmp_path):
    path = tmp_path / "deep" / "paro.safetensors"
    data = run_json(
        "calibrate",
        *MODEL,
        *SMALL,
        *RECIPE,
        "--prompt",
        "a cat",
        "--prompt",
        "a dog",
        "--buckets",
        "2",
        "--out",
        str(path),
    )
    assert data["megabytes"] == path.stat().st_size / 1e6
    assert data["transformers"]["transformer"]["noise_levels"] == 2
    assert set(CalibrationArtifact.load(path).transformers) == {"transformer"}
    clip = str(tmp_path / "cat.mp4")
    generate = ["generate", *MODEL, *SMALL, *RECIPE, "--prompt", "a cat", "--out", clip]
    made = run_json(*generate, "--calibration", str(path))
    assert made["summary"]["sparse_calls"] > 0
    result = run(*generate)
    assert result.exit_code == 2
    assert "dit-accel calibrate" in result.stderr
    result = run(
        *generate[:-4], "--set", "select.density=0.1", "--prompt", "a cat", "--out", clip, "--calibration", str(path)
    )
    assert result.exit_code == 2
    assert "select.density = 0.5, got 0.1" in result.stderr
    assert "or give --rederive to keep what still holds" in result.stderr
    anew = ["--set", "select.density=0.1", "--prompt", "a cat", "--out", clip, "--calibration", str(path), "--rederive"]
    assert run_json(*generate[:-4], *anew)["summary"]["sparse_calls"] > 0
    result = run(*generate[:-4], *anew[:-3], "--rederive")
    assert result.exit_code == 2
    assert "--rederive goes with --calibration" in result.stderr


def test_bad_requests_are_sentences(tmp_path):
    for recipe, words in (("na", "nothing to calibrate"), ("auto", "nothing to calibrate")):
        result = run("calibrate", *MODEL, *SMALL, "--recipe", recipe, "--out", str(tmp_path / "x"))
        assert result.exit_code == 2
        assert words in result.stderr
