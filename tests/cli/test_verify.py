"""verify: a card of runs in turns, that goes on where it was broken off, of videos and of images."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dit_accel import patch, presets
from dit_accel.pipelines import load, loading
from dit_accel.quality import card as cards
from dit_accel.quality import compare as comparing
from tests.cli.test_commands import SMALL, run, run_json
from tests.tiny import TINY

MODEL = ["verify", "random-wan", "--device", "cpu", "--dtype", "fp32"]
RECIPE = "pooled;select.density=0.5;select.block=(32,32);schedule.dense_fraction=0.0"
ONE = ["--profiles", "none", "--recipe", RECIPE, "--metrics", "psnr,ssim,flicker"]
TWO = ["--prompt", "a cat", "--prompt", "a dog"]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that were loaded."""
    real, names = loading.load, []

    def counted(name: str, **options: Any) -> Any:
        names.append(name)
        return real(name, **options)

    monkeypatch.setattr(loading, "load", counted)
    return names


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Whole runs that were made, by prompt and seed; those beyond ``allowed`` are interrupted."""
    real, state = comparing.generate_clip, {"allowed": 1000, "made": []}

    def counted(pipe: Any, prompt: str, seed: int, arguments: Any) -> Any:
        if arguments["num_inference_steps"] == 3 and arguments.get("height") == 96:
            if len(state["made"]) >= state["allowed"]:
                raise KeyboardInterrupt
            state["made"].append((prompt, seed))
        return real(pipe, prompt, seed, arguments)

    monkeypatch.setattr(comparing, "generate_clip", counted)
    # A warm-up is shorter than these runs, so that the two are told apart.
    monkeypatch.setattr("dit_accel.quality.turns.LONG_WARM_UP_STEPS", 2)
    return state


def test_a_card_says_what_ran_and_keeps_no_pictures(tmp_path: Path, runs) -> None:
    out = tmp_path / "card"
    asked = [
        *MODEL,
        *SMALL,
        *ONE,
        "--prompt",
        "a cat",
        "--seed",
        "3",
        "--seeds",
        "2",
        "--note",
        "beside | other <work>",
    ]
    data = run_json(*asked, "--repeat", "2", "--guidance", "3", "--out", str(out))
    assert runs["made"] == [("a cat", 3)] * 4 + [("a cat", 4)] * 4
    assert data == json.loads((out / "card.json").read_text()) == cards.read_card(out / "card.json")
    assert (data["width"], data["height"], data["frames"], data["num_steps"]) == (96, 96, 5, 3)
    assert data["sequence"]["latent_tokens"] == 2 * 12 * 12
    assert data["settings"]["call"]["guidance_scale"] == 3.0
    assert data["random_weights"]
    for result in data["results"]:
        assert result["clip"] is None
        assert len(result["runs"]) == len(result["stages"]) == 2
        for total, stages in zip(result["runs"], result["stages"], strict=True):
            assert stages["count"] == 3
            assert min(stages.values()) > 0
            assert sum(stages[name] for name in ("text", "steps", "decode")) == pytest.approx(total)
    (recipe,) = data["recipes"]
    assert recipe["recipe"] == RECIPE
    assert recipe["settings"] == RECIPE.replace(";", "; ").replace("(32,32)", "(32, 32)")
    assert recipe["dense_calls"] == {}
    assert recipe["sparse_calls"] == 2 * 3 * 2 * data["sequence"]["layers"]  # clips, steps, branches, layers
    assert recipe["sparse_density"] == pytest.approx(recipe["density"]["mean"])
    assert not (out / "clips").exists()
    assert sorted(path.name for path in out.iterdir()) == [
        "card.json", "index.html", "parts", "pipeline.json", "report.json", "row.md", "settings.json",
    ]  # fmt: skip
    page = (out / "index.html").read_text()
    assert "Where the time goes" in page
    assert not re.search(r"https?://|url\(|<video|<img", page)
    (row,) = (out / "row.md").read_text().splitlines()
    assert row.count(" | ") == cards.HEAD.count(" | ")
    assert "2 clips" in row


def test_decibels_are_those_of_a_patch_alone(tmp_path: Path) -> None:
    """An independent way: each side by itself, and the error in float64."""
    data = run_json(*MODEL, *SMALL, *ONE, "--prompt", "a cat", "--seed", "5", "--out", str(tmp_path))
    pipe = load("random-wan", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def frames() -> np.ndarray:
        arguments = {"height": 96, "width": 96, "num_frames": 5, "num_inference_steps": 3}
        made = pipe(prompt="a cat", generator=torch.Generator().manual_seed(5), output_type="np", **arguments)
        return np.round(made.frames[0].astype(np.float64) * 255) / 255

    dense = frames()
    recipe = presets.pooled(density=0.5, dense_fraction=0.0).with_fields({"select.block": (32, 32)})
    with patch(pipe, recipe) as handle:
        fast = frames()
        summary = handle.summary()
    psnr = -10 * np.log10(((dense - fast) ** 2).mean((1, 2, 3))).mean()
    (found,) = data["recipes"]
    assert 20 < psnr < 80
    assert found["metrics"]["psnr"]["mean"] == pytest.approx(psnr, abs=0.5)
    assert found["density"]["mean"] == pytest.approx(summary.mean_density)


def test_an_interrupted_run_goes_on_and_keeps_finished_clips(tmp_path: Path, runs, loads) -> None:
    asked = [*MODEL, *SMALL, *ONE, *TWO, "--out", str(tmp_path)]
    runs["allowed"] = 3  # within the second clip
    assert run(*asked).exit_code == 130
    sofar = json.loads((tmp_path / "card.json").read_text())
    assert (sofar["clips"], sofar["prompts"]) == (1, ["a cat"])
    (part,) = (tmp_path / "parts").iterdir()
    kept = part.read_bytes()
    runs |= {"allowed": 1000, "made": []}
    result = run(*asked)
    assert result.exit_code == 0, result.stderr
    assert f"{tmp_path} holds 1 finished parts" in result.stderr
    assert runs["made"] == [("a dog", 0)] * 2
    assert part.read_bytes() == kept
    data = json.loads((tmp_path / "card.json").read_text())
    assert [one["prompt"] for one in data["results"]] == ["a cat", "a cat", "a dog", "a dog"]
    before = json.loads(kept)["results"]
    assert [one["total_seconds"] for one in data["results"][:2]] == [one["total_seconds"] for one in before]
    assert "about" in result.stderr  # the time left
    # A third run has nothing to do, and loads nothing.
    runs["made"] = []
    again = run_json(*asked)
    assert runs["made"] == []
    assert again == data
    assert loads == ["random-wan"] * 2
    # Killed before its card had the last clip: the card is made anew, and no clip is.
    (tmp_path / "card.json").write_text(json.dumps(sofar))
    assert run_json(*asked)["results"] == data["results"]
    assert runs["made"] == []


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--steps", "4"], "settings.steps = 3, got 4"),
        (["--seed", "1"], "seeds.0 = 0, got 1"),
        (["--profiles", "fast"], "recipes.fast"),
        (["--dtype", "bf16"], "dtype = 'float32', got 'bfloat16'"),
        (["--compile"], "compiled = False, got True"),
    ],
)
def test_clips_of_other_settings_are_refused_before_the_model_loads(tmp_path: Path, loads, more, words) -> None:
    from dit_accel.parts import Parts

    asked = [*MODEL, *SMALL, *ONE, "--prompt", "a cat", "--out", str(tmp_path)]
    with pytest.MonkeyPatch.context() as only_claimed:
        only_claimed.setattr("dit_accel.cli.model.open_model", _stop)
        assert "stopped here" in run(*asked).stderr
    Parts(tmp_path).write("0000", {})
    result = run(*asked, *more)
    assert result.exit_code == 2
    assert f"{tmp_path} holds outputs made with {words}" in result.stderr
    assert "--start-over" in result.stderr
    assert loads == []


def _stop(*_: Any, **__: Any) -> None:
    raise ValueError("stopped here")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--profiles", "swift"], "swift"),
        (["--profiles", "none"], "--profiles and --recipe must name one recipe at least, each once, got ''"),
        (["--profiles", "fast,fast"], "each once, got 'fast, fast'"),
        (["--metrics", "fvd"], "unknown metric 'fvd'"),
        (["--size", "96"], "--size must be WIDTHxHEIGHT"),
        (["--prompts-file", "/none.txt"], "cannot be read"),
        (["--prompt", "a", "--prompt", "a"], "prompts must be a non-empty sequence without repeats"),
        (["--seed", str(2**62), "--seeds", "2"], "--seed must lie in"),
        (["--out", "/proc/no"], "Cannot write in /proc/no"),
    ],
)
def test_refused_in_one_sentence_before_the_model_loads(arguments, words, loads, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*MODEL, *SMALL, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert loads == []


def test_a_report_of_somebody_is_not_overwritten(tmp_path: Path, loads) -> None:
    (tmp_path / "report.json").write_text("mine")
    result = run(*MODEL, *SMALL, *ONE, "--prompt", "a cat", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "no readable settings.json beside it says what made it" in result.stderr
    assert (tmp_path / "report.json").read_text() == "mine"
    assert loads == []


def test_without_a_folder_an_interrupted_run_is_found_again(tmp_path: Path, runs, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = [*MODEL, *SMALL, *ONE, *TWO]
    runs["allowed"] = 2
    assert run(*asked).exit_code == 130
    runs["allowed"] = 1000
    assert run(*asked).exit_code == 0
    assert [path.name for path in Path("outputs").iterdir()] == ["verify"]
    assert len(runs["made"]) == 4
    # What is finished is measured anew, in a folder of its own.
    with monkeypatch.context() as only_claimed:
        only_claimed.setattr("dit_accel.cli.model.open_model", _stop)
        result = run(*asked)
    assert f"{Path('outputs/verify')} is there already; this run writes {Path('outputs/verify-2')}" in result.stderr


def test_an_image_model_has_a_card_too(tmp_path: Path, monkeypatch) -> None:
    pipe = TINY["flux"].build()
    given = TINY["flux"].call(torch.Generator().manual_seed(0))
    embeddings = (given["prompt_embeds"], given["pooled_prompt_embeds"], torch.zeros(16, 3))
    pipe.encode_prompt = lambda **_: embeddings
    monkeypatch.setattr(loading, "load", lambda name, **_: pipe)
    asked = ["verify", str(tmp_path), "--size", "48x80", "--steps", "2", "--prompt", "a cat", "--device", "cpu"]
    recipe = RECIPE.replace("(32,32)", "(16,16)")
    data = run_json(
        *asked, "--profiles", "none", "--recipe", recipe, "--pictures", "--metrics", "psnr,flicker",
        "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert (data["frames"], data["height"], data["width"]) == (1, 80, 48)
    assert data["sequence"]["tokens"] == data["sequence"]["latent_tokens"] + 16
    (found,) = data["recipes"]
    assert found["density"]["mean"] < 1
    assert found["missing"]["flicker"] == ["Flicker needs at least 2 frames, got 1."]
    assert len(list((tmp_path / "out" / "clips").glob("*.png"))) == 2
    assert data["results"][0]["clip"] is None
    assert "48 x 80," in cards.card_rows(data)[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "x"}, "expected dit_accel.card version 1"),
        ({"recipes": [{}]}, "is not a card of dit-accel verify: no"),
        ({"recipes": 3}, "is not a card"),
    ],
)
def test_what_is_no_card_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "card.json"
    path.write_text(json.dumps({"format": cards.FORMAT, "version": 1, "num_steps": 1} | change))
    with pytest.raises(ValueError, match=words) as raised:
        cards.read_card(path)
    assert str(path) in str(raised.value)


def test_the_accelerated_side_may_have_its_own_autoencoder(tmp_path: Path, runs, monkeypatch) -> None:
    """Dense runs keep the pipeline's."""
    from dit_accel.acceleration import api

    real, asked, decoded = api.set_vae, [], []

    def changed(pipe: Any, settings: str) -> Any:
        undo, said = real(pipe, settings)
        asked.append(settings)

        def undone() -> None:
            asked.pop()
            undo()

        return undone, said

    made = comparing.generate_clip
    monkeypatch.setattr(api, "set_vae", changed)
    monkeypatch.setattr(comparing, "generate_clip", lambda *given: (decoded.append(len(asked)), made(*given))[1])
    data = run_json(*MODEL, *SMALL, *ONE, "--prompt", "a cat", "--vae", "frames=2", "--out", str(tmp_path / "card"))
    assert data["settings"]["vae"] == "frames=2"
    assert data["settings"]["linear"] is None
    assert ", autoencoder frames=2, 1 clip" in cards.run_of(data)
    # A warm-up and a run of each side.
    assert sorted(decoded) == [0, 0, 1, 1]
    assert asked == []


@pytest.mark.parametrize("wrong", [("--vae", "blurred"), ("--linear", "int4")])
def test_settings_that_cannot_be_are_refused_before_the_model_is_loaded(wrong, tmp_path: Path, loads) -> None:
    result = run(*MODEL, *SMALL, *ONE, "--prompt", "a cat", *wrong, "--out", str(tmp_path / "card"))
    assert result.exit_code == 2
    assert wrong[1] in result.stderr
    assert loads == []


def test_a_folder_that_knows_nothing_of_settings_beside_attention_is_gone_on_in_without_them(
    tmp_path: Path, runs
) -> None:
    asked = [*MODEL, *SMALL, *ONE, "--prompt", "a cat", "--out", str(tmp_path)]
    run_json(*asked)
    path = tmp_path / "settings.json"
    settings = json.loads(path.read_text())
    # As earlier versions wrote it.
    path.write_text(json.dumps({name: value for name, value in settings.items() if name not in ("linear", "vae")}))
    runs["made"] = []
    run_json(*asked)
    assert runs["made"] == []
    result = run(*asked, "--vae", "tiled")
    assert result.exit_code != 0
    assert "vae" in result.stderr


def test_the_accelerated_side_may_replay_its_blocks(tmp_path: Path) -> None:
    """On a CPU nothing is replayed; the card and the page say what was asked."""
    data = run_json(*MODEL, *SMALL, *ONE, "--prompt", "a cat", "--graphs", "--out", str(tmp_path / "card"))
    assert data["settings"]["graphs"] is True
    assert ", CUDA graphs, 1 clip" in cards.run_of(data)
    result = run(*MODEL, *SMALL, *ONE, "--prompt", "a cat", "--out", str(tmp_path / "card"))
    assert result.exit_code == 2
    assert "graphs" in result.stderr
