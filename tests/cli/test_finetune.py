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
from tests.cli.documented import documented_keys
from tests.training.samples import files_up_to

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
    assert sorted(report) == sorted(documented_keys(["finetune"]))
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


def test_distilled_to_few_steps_and_generated_with_them(tmp_path: Path) -> None:
    """The samples know no prompt, the adapter knows its steps, and generate takes them."""
    few = ["--objective", "consistency", "--few-steps", "2", "--teacher-steps", "3", "--guidance", "3"]
    done = run(*SMALL, *BLOCKS, "--count", "3", "--out", str(tmp_path), "--steps", "1", *few, "--json")
    assert done.exit_code == 0, done.stderr
    adapter = json.loads(done.stdout)["adapter"]
    card = json.loads((Path(adapter) / "adapter.json").read_text())
    assert len(card["steps"]["sigmas"]) == 2
    assert card["training"]["config"]["few_steps"]["guidance"] == 3.0
    call = ["generate", "random-wan", "--prompt", "a cat", "--size", "64x64", "--frames", "5", "--device", "cpu"]
    made = CliRunner().invoke(app, [*call, "--adapter", adapter, "--out", str(tmp_path / "x.mp4"), "--json"])
    assert made.exit_code == 0, made.stderr
    report = json.loads(made.stdout)
    assert report["settings"]["steps"] == 2
    assert report["settings"]["guidance"] == 1.0
    both = [*call, "--adapter", adapter, "--compare-dense", "--steps", "3", "--out", str(tmp_path / "y.mp4"), "--json"]
    compared = CliRunner().invoke(app, both)
    assert compared.exit_code == 0, compared.stderr
    assert json.loads(compared.stdout)["settings"]["steps"] == 2
    refused = CliRunner().invoke(app, [*call, "--adapter", adapter, "--steps", "7"])
    assert refused.exit_code != 0
    assert "distilled to 2 steps" in " ".join(refused.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--few-steps", "5", "--teacher-steps", "4"], "must be at least the 5 steps"),
        (["--objective", "magic"], "--objective must be one of flow"),
        (["--recipe", "auto"], "cannot be trained"),
        (["--data", "a", "--clips", "b"], "not both"),
        (["--data", "nowhere"], "There is no folder nowhere"),
        (["--train", "heads"], "train must be one of learned"),
        (["--resume", "--start-over"], "not both"),
        (["--clips", "nowhere"], "There is no folder nowhere"),
        (["--seed", "-1"], "--seed must lie in 0 to"),
        (["--backend", "magic"], "Unknown backend 'magic'"),
        (["--prompts-file", "nowhere"], "--prompts-file nowhere cannot be read: No such file"),
        (["--out", "/proc/nowhere/out"], "Cannot write in /proc/nowhere/out"),
    ],
)
def test_errors_are_one_sentence(arguments: list[str], message: str) -> None:
    result = run(*SMALL, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_ready_samples_that_are_not_there_are_refused_before_the_model_is_loaded() -> None:
    result = run("--data", "nowhere", "--device", "cpu")
    assert result.exit_code == 2
    assert "There is no folder nowhere" in result.stderr
    assert "Loading" not in result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must hold a prompt"),
        (b" \n\n", "must hold a prompt"),
        ("\xc4ffchen".encode("latin-1"), "must be UTF-8 text"),
    ],
)
def test_prompts_that_cannot_be_used(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    result = run(*SMALL, "--prompts-file", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_prompts_with_a_byte_order_mark_and_frames_that_the_model_does_not_make(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\ufeffein Äffchen\r\n\r\nzwei\u2028Äpfel", encoding="utf-8")
    arguments = [*SMALL, *BLOCKS, "--prompts-file", str(tmp_path / "prompts.txt"), "--count", "3", "--frames", "6"]
    result = run(*arguments, "--steps", "1", "--checkpoint-every", "0", "--out", str(tmp_path))
    assert result.exit_code == 0, result.stderr
    assert "makes 5 frames, not the 6 that --frames asks for" in result.stderr
    record = json.loads((tmp_path / "samples" / "samples.json").read_text(encoding="utf-8"))
    assert [sample["prompt"] for sample in record["samples"].values()] == [
        "ein Äffchen",
        "zwei\u2028Äpfel",
        "ein Äffchen",
    ]


def test_the_folder_of_a_fine_tuning_knows_what_it_belongs_to(tmp_path: Path) -> None:
    """Other samples are refused or start over, a new run keeps its own checkpoints, and only the same one goes on."""
    out = ["--out", str(tmp_path), "--checkpoint-every", "1"]
    common = ["--frames", "5", "--generate-steps", "1", "--device", "cpu", *out]
    first = run("--size", "64x64", *common, *BLOCKS, "--count", "2", "--steps", "2")
    assert first.exit_code == 0, first.stderr
    other = run("--size", "96x96", *common, *BLOCKS, "--count", "1", "--steps", "1")
    assert other.exit_code == 2
    assert "made with width = 64, got 96; give another folder (--out), or start over (--start-over)." in other.stderr
    resumed = ["--size", "64x64", *common, "--count", "2", "--steps", "3", "--resume"]
    recipe = run(*resumed, "--set", "select.block=(32, 32)", "--set", "select.density=0.5")
    assert recipe.exit_code == 2
    assert "step-0000002 was trained with select.density = 0.3, got 0.5" in recipe.stderr
    anew = run("--size", "64x64", *common, *BLOCKS, "--count", "2", "--steps", "1", "--learning-rate", "1e-3")
    assert anew.exit_code == 0, anew.stderr
    assert f"An earlier training in {tmp_path} was moved to {tmp_path / 'earlier-1'}." in anew.stderr
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000001"]
    on = run(*resumed, *BLOCKS, "--learning-rate", "1e-3")
    assert on.exit_code == 0, on.stderr
    rates = [entry["learning_rate"] for entry in json.loads((tmp_path / "curves.json").read_text())["steps"]]
    assert rates == [1e-3] * 3
    over = run("--size", "96x96", *common, *BLOCKS, "--count", "1", "--steps", "1", "--json", "--start-over")
    assert over.exit_code == 0, over.stderr
    assert json.loads(over.stdout)["samples"] == 1
    assert len(list((tmp_path / "samples" / "earlier-1").glob("*.safetensors"))) == 2


def test_a_recipe_that_cannot_be_trained_is_refused_before_samples_are_made(tmp_path: Path) -> None:
    for arguments, message in (
        (["--recipe", "pooled", "--train", "learned"], "no parameters of its own"),
        (["--recipe", "window", "--density-start", "0.5", "--density-steps", "1"], "needs a recipe with a density"),
    ):
        result = run(*SMALL, *arguments, "--out", str(tmp_path))
        assert result.exit_code == 2
        assert message in result.stderr
        assert not (tmp_path / "samples").exists()


def test_clips_that_cannot_be_used_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    arguments = ["--clips", str(tmp_path / "clips"), "--size", "64x64", "--frames", "1", "--device", "cpu"]
    empty = run(*arguments, "--out", str(tmp_path / "out"))
    assert "will not be used" not in empty.stderr
    assert empty.exit_code == 2
    assert "holds no clip (" in empty.stderr
    for name in ("a.png", "b.mp4"):
        (tmp_path / "clips" / name).write_bytes(b"nothing")
        (tmp_path / "clips" / name).with_suffix(".txt").write_text("a caption")
    broken = run(*arguments, "--guidance", "2", "--count", "3", "--out", str(tmp_path / "out"))
    assert broken.exit_code == 2
    assert "--clips brings its own samples: --count, --guidance will not be used." in broken.stderr
    assert "Skipped b.mp4: it cannot be read" in broken.stderr
    assert broken.stderr.splitlines()[-1].startswith("Error: ")
    assert "holds no clip that can be used; a.png: it cannot be read" in broken.stderr.splitlines()[-1]


@pytest.mark.parametrize("limit", [100, 20_000, 400_000])
def test_a_full_disk_is_one_sentence(tmp_path: Path, limit: int) -> None:
    """While samples are made, and while checkpoints are."""
    with files_up_to(limit):
        result = run(*SMALL, *BLOCKS, "--count", "1", "--steps", "2", "--checkpoint-every", "1", "--out", str(tmp_path))
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.stderr
    assert "Error: Cannot write" in result.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("checkpoints/*"))


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
