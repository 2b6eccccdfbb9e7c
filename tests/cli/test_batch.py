"""generate with a file of prompts: one load, files by number and slug, and going on where a run ended."""

from __future__ import annotations

import json
from pathlib import Path

import imageio.v3 as iio
import pytest

from dit_accel.cli.batch import LONGEST_SLUG, plan_outputs, slug
from tests.cli.test_commands import run, run_json

TINY = ["--device", "cpu", "--size", "64x64", "--frames", "5", "--steps", "1", "--dtype", "fp32"]
PROMPTS = "\ufeff# ours\n\na Red car, at night!\n  猫が飛ぶ  \n#a dog\n!?\n"
NAMES = ["001-a-red-car-at-night.mp4", "002-猫が飛ぶ.mp4", "003.mp4"]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    (tmp_path / "p.txt").write_text(PROMPTS, encoding="utf-8")
    out = ["--out", str(tmp_path / "made")]
    return ["generate", "random-wan", "--prompts", str(tmp_path / "p.txt"), *TINY, *out]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that were loaded."""
    from dit_accel.pipelines import loading

    real, names = loading.load, []

    def counted(name, **options):
        names.append(name)
        return real(name, **options)

    monkeypatch.setattr(loading, "load", counted)
    return names


def test_every_prompt_has_a_file_of_its_own_by_one_load(tmp_path: Path, arguments, loads) -> None:
    data = run_json(*arguments, "--seed", "3")
    assert loads == ["random-wan"]
    assert [row["prompt"] for row in data["outputs"]] == ["a Red car, at night!", "猫が飛ぶ", "!?"]
    assert [row["seed"] for row in data["outputs"]] == [3, 4, 5]
    folder = tmp_path / "made"
    assert sorted(path.name for path in folder.iterdir()) == [*NAMES, "settings.json"]
    for row, name in zip(data["outputs"], NAMES, strict=True):
        assert row["file"] == str(folder / name)
        assert row["made"]["frames"] == len(iio.imread(row["file"], plugin="FFMPEG")) == 5
        assert row["made"]["seconds"] > 0
    # Each is what the prompt alone gives with that seed.
    alone = run_json(*arguments[:2], "--prompt", "猫が飛ぶ", "--seed", "4", *TINY, "--out", str(tmp_path / "x.mp4"))
    assert Path(alone["files"]["out"]).read_bytes() == (folder / NAMES[1]).read_bytes()


def test_a_second_run_makes_what_is_missing_and_loads_nothing_for_nothing(tmp_path: Path, arguments, loads) -> None:
    run_json(*arguments)
    folder = tmp_path / "made"
    before = {name: (folder / name).read_bytes() for name in NAMES}
    (folder / NAMES[1]).unlink()
    (folder / NAMES[0]).write_text("kept")
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert f"{folder / NAMES[0]} is finished already; it is left as it is." in result.stderr
    assert NAMES[1] not in result.stderr
    assert (folder / NAMES[0]).read_text() == "kept"
    assert (folder / NAMES[1]).read_bytes() == before[NAMES[1]]
    lines = result.stdout.splitlines()
    assert "1 of 3" in lines[0]
    assert "finished" in lines[0]
    assert " s " in lines[1]
    assert loads == ["random-wan"] * 2
    again = run_json(*arguments)
    assert [row["made"] for row in again["outputs"]] == [None] * 3
    assert loads == ["random-wan"] * 2


def test_what_was_made_before_an_error_is_kept_and_gone_on_from(tmp_path: Path, arguments, monkeypatch) -> None:
    from dit_accel.pipelines import generate

    real = generate.write_mp4

    def full(frames, path, *rest, **options):
        if path.name == NAMES[1]:
            raise ValueError(f"Cannot write {path}: No space left on device.")
        real(frames, path, *rest, **options)

    with monkeypatch.context() as patched:
        patched.setattr(generate, "write_mp4", full)
        result = run(*arguments)
    assert result.exit_code == 2
    assert "No space left on device" in result.stderr
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [NAMES[0], "settings.json"]
    made = [row["made"] is not None for row in run_json(*arguments)["outputs"]]
    assert made == [False, True, True]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--seed", "1"], "seed = 0, got 1"),
        (["--steps", "2"], "settings.steps = 1, got 2"),
        (["--recipe", "pooled"], "recipe = 'auto', got"),
        (["--negative-prompt", "rain"], "negative_prompt = None, got 'rain'"),
    ],
)
def test_outputs_of_other_settings_are_not_taken_for_ones_own(tmp_path: Path, arguments, loads, more, words) -> None:
    run_json(*arguments)
    result = run(*arguments, *more)
    assert result.exit_code == 2
    assert f"{tmp_path / 'made'} holds outputs made with {words}" in result.stderr
    assert loads == ["random-wan"]


def test_a_file_of_nobody_knows_what_is_not_taken_either(tmp_path: Path, arguments, loads) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / NAMES[2]).write_text("mine")
    result = run(*arguments)
    assert result.exit_code == 2
    assert "no readable settings.json beside it says what made it" in result.stderr
    assert loads == []


def test_what_does_not_go_together_is_said_in_a_sentence(tmp_path: Path, arguments, loads) -> None:
    for more, words in (
        (["--prompt", "a cat"], "Give --prompt or --prompts, got both"),
        (["--compare-dense"], "--compare-dense goes with --prompt; `dit-accel compare` takes many prompts"),
        (["--out", str(tmp_path / "x.mp4")], "With --prompts --out is a folder, got"),
        (["--out", str(tmp_path / "p.txt")], "With --prompts --out is a folder, got"),
    ):
        result = run(*arguments, *more)
        assert result.exit_code == 2
        assert words in result.stderr
    (tmp_path / "p.txt").write_text("# nothing\n\n")
    assert "must hold a prompt, one a line, got none" in run(*arguments).stderr
    assert loads == []
    assert not (tmp_path / "made").exists()


def test_the_default_folder_is_the_same_in_every_run(tmp_path: Path, arguments, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for made in (True, False):
        data = run_json(*arguments[:-2])
        assert data["folder"] == "outputs/random-wan-0"
        assert [row["made"] is not None for row in data["outputs"]] == [made] * 3
    assert json.loads(Path("outputs/random-wan-0/settings.json").read_text())["model"] == "random-wan"


def test_names(tmp_path: Path) -> None:
    assert slug("  A_red/../car:  ") == "a-red-car"
    assert slug("…") == ""
    long = slug("猫" * 200)
    assert len(long) == LONGEST_SLUG
    outputs = plan_outputs(["same"] * 1001, tmp_path, 0, ".png")
    assert outputs[0].file.name == "0001-same.png"
    assert len({output.file for output in outputs}) == 1001
    plan_outputs(["猫" * 200], tmp_path, 0, ".mp4")[0].file.touch()
