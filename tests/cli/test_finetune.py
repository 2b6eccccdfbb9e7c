"""``dit-accel finetune`` from outside, on the random model; the same through the example."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import dit_accel
from dit_accel.cli.main import app
from dit_accel.pipelines.random_wan import build_random_wan

SMALL = ["--size", "64x64", "--frames", "5", "--generate-steps", "2", "--device", "cpu"]
BLOCKS = ["--set", "select.block=(32, 32)", "--set", "select.density=0.3"]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["finetune", "random-wan", *arguments])


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_self_generated_data_to_adapter_and_on_from_a_checkpoint(tmp_path: Path) -> None:
    common = [*SMALL, *BLOCKS, "--count", "3", "--out", str(tmp_path), "--checkpoint-every", "2", "--json"]
    first = run(*common, "--steps", "2", "--learning-rate", "1e-3")
    assert first.exit_code == 0, first.stderr
    report = json.loads(first.stdout)
    assert report["samples"] == 3
    assert report["objective"] == "flow"
    assert report["last"]["step"] == 2
    assert (tmp_path / "curves.png").is_file()
    on = run(*common, "--steps", "3", "--learning-rate", "1e-3", "--resume")
    assert on.exit_code == 0, on.stderr
    assert json.loads(on.stdout)["last"]["step"] == 3
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert [entry["step"] for entry in curves["steps"]] == [1, 2, 3]
    pipe = build_random_wan()
    with dit_accel.load_adapter(pipe, report["adapter"]) as handle:
        assert handle.recipe.select.density == 0.3
        assert pipe.transformer.blocks[0].attn1.dit_accel.weight.abs().max() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objective", "magic"], "--objective must be one of flow"),
        (["--recipe", "auto"], "cannot be trained"),
        (["--data", "a", "--clips", "b"], "not both"),
        (["--data", "nowhere"], "There is no folder nowhere"),
        (["--train", "heads"], "train must be one of learned"),
    ],
)
def test_errors_are_one_sentence(arguments: list[str], message: str) -> None:
    result = run(*SMALL, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_the_example_runs(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    small = (
        "--model random-wan --width 64 --height 64 --frames 5 --denoising-steps 2 --steps 3 --samples 2 --lora-rank 2"
    )
    done = subprocess.run(
        [sys.executable, "examples/finetune_sparse_attention.py", *small.split(), "--out", str(tmp_path)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "velocity error against dense" in done.stdout
    assert (tmp_path / "clip.mp4").is_file()
