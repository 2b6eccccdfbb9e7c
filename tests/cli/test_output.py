"""What commands write: whole or not at all, never over what nobody named, in UTF-8 and as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import pytest

import dit_accel
from dit_accel import CalibrationArtifact, Recipe
from dit_accel.cli import info
from dit_accel.cli.options import read_prompt
from dit_accel.cli.output import free_name
from tests.cli.test_commands import run, run_json

TINY = ["--device", "cpu", "--size", "64x64", "--frames", "5", "--steps", "1"]
GENERATE = ["generate", "random-wan", "--prompt", "a cat", *TINY]
SEARCH = ["search", "random-wan", "--prompt", "a cat", "--samples", "1", *TINY, "--set", "select.block=(32,32)"]


def test_a_default_name_is_that_of_no_other_run(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = run_json(*GENERATE)
    assert first["files"] == {"out": "outputs/random-wan-0.mp4"}
    before = Path("outputs/random-wan-0.mp4").read_bytes()
    result = run(*GENERATE, "--guidance", "1")
    assert result.exit_code == 0, result.stderr
    assert "outputs/random-wan-0.mp4 is there already; this run writes outputs/random-wan-0-2.mp4" in result.stderr
    Path("outputs/random-wan-0-3.dense.mp4").write_text("of another run")
    third = run_json(*GENERATE, "--compare-dense")
    assert third["files"] == {"out": "outputs/random-wan-0-4.mp4", "dense": "outputs/random-wan-0-4.dense.mp4"}
    assert Path("outputs/random-wan-0.mp4").read_bytes() == before


def test_a_name_that_was_given_is_written_again(tmp_path) -> None:
    path = tmp_path / "cat.mp4"
    path.write_text("old")
    data = run_json(*GENERATE, "--out", str(path))
    assert data["files"] == {"out": str(path)}
    assert len(iio.imread(path, plugin="FFMPEG")) == 5


def test_free_names(tmp_path) -> None:
    assert free_name(tmp_path / "a.json") == tmp_path / "a.json"
    (tmp_path / "a.json").touch()
    (tmp_path / "a-2.json").mkdir()
    (tmp_path / "a-2.json" / "b").touch()
    assert free_name(tmp_path / "a.json") == tmp_path / "a-3.json"
    (tmp_path / "empty").mkdir()
    assert free_name(tmp_path / "empty") == tmp_path / "empty"
    (tmp_path / "Wan2.1-0.mp4").touch()
    assert free_name(tmp_path / "Wan2.1-0.mp4") == tmp_path / "Wan2.1-0-2.mp4"


def test_other_commands_take_free_names_too(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    steps = [*TINY[:-1], "2"]
    calibrate = ["calibrate", "random-wan", "--prompt", "a cat", *steps, "--recipe", "pooled"]
    assert run_json(*calibrate)["file"] == "outputs/calibration.safetensors"
    assert run_json(*calibrate)["file"] == "outputs/calibration-2.safetensors"
    assert run_json(*SEARCH, "--density", "0.9")["file"] == "outputs/found.json"
    assert run_json(*SEARCH, "--density", "0.8")["file"] == "outputs/found-2.json"
    inspect = ["inspect", "random-wan", "--prompt", "a cat", *steps, "--at-step", "0", "--layer", "0"]
    for _ in range(2):
        assert run(*inspect).exit_code == 0
    assert sorted(path.name for path in Path("outputs").glob("inspect*")) == ["inspect", "inspect-2"]


@pytest.mark.parametrize(("asked", "made"), [(6, 5), (10, 9), (3, 1), (5, 5)])
def test_frames_are_those_made_and_a_difference_is_said(tmp_path, asked, made) -> None:
    path = tmp_path / "cat.mp4"
    result = run(*GENERATE, "--frames", str(asked), "--out", str(path), "--json")
    assert result.exit_code == 0, result.stderr
    settings = json.loads(result.stdout)["settings"]
    assert settings["frames"] == made == len(iio.imread(path, plugin="FFMPEG"))
    assert (settings["width"], settings["height"]) == (64, 64)
    assert (f"makes {made} frames, not the {asked} that --frames asks for" in result.stderr) == (asked != made)


@pytest.mark.parametrize("command", ["calibrate", "search", "inspect", "compare"])
def test_frames_that_are_rounded_are_said_by_every_command(tmp_path, command) -> None:
    given = {
        "calibrate": ["--recipe", "pooled", "--out", str(tmp_path / "c")],
        "search": [*SEARCH[-2:], "--density", "0.9", "--samples", "1", "--out", str(tmp_path / "f.json")],
        "compare": ["--recipe", "dense", "--metrics", "psnr", "--out", str(tmp_path / "d")],
        "inspect": ["--at-step", "0", "--layer", "0", "--out", str(tmp_path / "i")],
    }[command]
    size = ["--device", "cpu", "--size", "64x64", "--frames", "6", "--steps", "2", "--prompt", "a cat"]
    result = run(command, "random-wan", *size, *given)
    assert result.exit_code == 0, result.stderr
    assert "WanPipeline makes 5 frames, not the 6 that --frames asks for" in result.stderr


def test_a_video_that_cannot_be_encoded_is_an_error_and_keeps_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "cat.mp4"
    path.write_text("old")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dit_accel.pipelines.encode.refuse_missing_encoder", lambda: None)
    monkeypatch.setattr("dit_accel.pipelines.encode._encode", full)
    result = run(*GENERATE, "--out", str(path))
    assert result.exit_code == 2
    assert f"Error: Cannot write {path}: No space left on device" in result.stderr
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_encoder_is_found_before_the_model_is_loaded(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("dit_accel.pipelines.loading.load", lambda *a, **k: pytest.fail("the model was loaded"))
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "gone"))
    result = run(*GENERATE, "--out", str(tmp_path / "cat.mp4"))
    assert result.exit_code == 2
    assert "Error: No video can be written: " in result.stderr


def test_what_a_search_measured_is_not_lost_with_its_file(tmp_path, monkeypatch) -> None:
    def full(self: Recipe, path: Path) -> None:
        raise ValueError(f"Cannot write {path}: No space left on device.")

    monkeypatch.setattr(Recipe, "save", full)
    result = run(*SEARCH, "--density", "0.9", "--out", str(tmp_path / "f.json"))
    assert result.exit_code == 2
    assert "No space left on device" in result.stderr
    report = json.loads(result.stdout)
    assert report["file"] is None
    assert Recipe.from_dict(report["recipe"]).select.head_densities
    assert report["measured"]["error"]


def test_text_is_utf8_where_the_locale_is_not(tmp_path) -> None:
    """Prompts from a file and from the command line, and the reports, in a process without a UTF-8 locale."""
    (tmp_path / "p.txt").write_bytes("\ufeff三只猫\nÄpfel \u2028 und [bold]Birnen :cat:\n".encode())
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    program = [sys.executable, "-m", "dit_accel.cli.main"]
    given = ["calibrate", "random-wan", "--recipe", "pooled", *TINY[:-1], "2", "--prompts-file", "p.txt"]
    result = subprocess.run(
        [*program, *given, "--prompt", "Füße [b]", "--out", "ä.safetensors"],
        capture_output=True,
        cwd=tmp_path,
        env=os.environ | plain,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "ä.safetensors, 0.0 MB" in result.stdout.decode()
    prompts = CalibrationArtifact.load(tmp_path / "ä.safetensors").facts["prompts"]
    assert prompts == ["Füße [b]", "三只猫", "Äpfel \u2028 und [bold]Birnen :cat:"]


def test_bytes_that_the_locale_does_not_know_are_utf8_or_refused() -> None:
    assert read_prompt("猫 [b]") == "猫 [b]"
    assert read_prompt(os.fsdecode("猫".encode())) == "猫"
    assert read_prompt("\udce7\udc8c\udcab") == "猫"
    for text in ("\udcff", "\ud800"):
        with pytest.raises(ValueError, match="--negative-prompt must be UTF-8 text"):
            read_prompt(text, "--negative-prompt")


def test_square_brackets_are_text(monkeypatch) -> None:
    data = info.collect(info.read_device("cpu"))
    odd = "pip install 'dit-accel[fa4]' [bold]x[/bold] :cat:"
    data["backends"] = [{"name": "fa4", "available": False, "reason": odd}]
    data["models"] = [{"name": "[red]model[/red]", "description": odd, "adapters": ["[a]"]}]
    data["device"]["name"] = odd
    monkeypatch.setattr(info, "collect", lambda device: data)
    monkeypatch.setenv("COLUMNS", "300")
    result = run("info", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count(odd) == 4  # the device twice
    assert "[red]model[/red]" in result.stdout
    assert "[a]" in result.stdout


@pytest.mark.parametrize("arguments", [["--version"], ["--version", "generate"]])
def test_version(arguments) -> None:
    result = run(*arguments)
    assert result.exit_code == 0
    assert result.stdout == f"dit-accel {dit_accel.__version__}\n"
