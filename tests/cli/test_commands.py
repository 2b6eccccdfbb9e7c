"""The command line from outside: JSON on stdout, files, and one sentence on errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import pytest
from typer.testing import CliRunner

from dit_accel.cli.main import app
from dit_accel.kernels import BACKENDS
from dit_accel.patches.families import FAMILIES
from dit_accel.pipelines.builtin import builtins
from dit_accel.presets import PRESETS
from tests.cli.documented import documented_keys

BENCH = ["bench", "--layers", "1", "--size", "64x64", "--frames", "5", "--device", "cpu", "--repeats", "2"]
GENERATE = ["generate", "random-wan", "--prompt", "a cat", "--device", "cpu"]
SMALL = ["--size", "96x96", "--frames", "5", "--steps", "3"]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def run_json(*arguments: str) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    data: dict[str, Any] = json.loads(result.stdout)
    assert sorted(data) == sorted(documented_keys(arguments)), "docs/cli.md"
    return data


def test_info_lists_everything() -> None:
    data = run_json("info", "--device", "cpu")
    assert data["device"]["type"] == "cpu"
    assert {"torch", "diffusers", "dit-accel"} <= set(data["versions"])
    assert data["support"] == "tested: the torch backend"
    assert [row["name"] for row in data["backends"]] == list(BACKENDS)
    assert all(row["available"] or row["reason"] for row in data["backends"])
    operations = {row["name"]: row for row in data["operations"]}
    assert {"selection", "block mass", "linear branch", "quantized attention"} <= set(operations)
    assert all(row["backend"] in BACKENDS and row["reason"] for row in operations.values())
    assert [row["name"] for row in data["families"]] == [family.name for family in FAMILIES]
    recipes = {row["name"]: row["options"] for row in data["recipes"]}
    assert set(recipes) == set(PRESETS)
    assert recipes["pooled"]["density"] == 0.2
    assert data["axes"]["select"]["pooled"]["block"] == [128, 64]


def test_info_as_text() -> None:
    short = run("info", "--device", "cpu")
    assert short.exit_code == 0
    for word in ("Backends", "HunyuanVideo", "pooled", "wan2.1-1.3b", "random-wan", "dit-accel info --all"):
        assert word in short.stdout
    assert len(short.stdout.splitlines()) < 100, "what runs here is not scrolled away"
    whole = run("info", "--device", "cpu", "--all")
    assert whole.exit_code == 0
    for word in ("Backends", "HunyuanVideoTransformer3DModel", "pooled", "select.density=0.2", "random-wan"):
        assert word in whole.stdout
    assert len(whole.stdout.splitlines()) > 200


def test_bench_measures_both_variants(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "bench.json"
    data = run_json(*BENCH, "--set", "select.density=0.5", "--out", str(out))
    assert data == json.loads(out.read_text())
    assert data["latent_tokens"] == 2 * 4 * 4
    assert len(data["dense"]["seconds"]) == len(data["patched"]["seconds"]) == 2
    assert data["speedup"] == pytest.approx(data["dense"]["median_s"] / data["patched"]["median_s"])
    low, high = data["speedup_range"]
    noise = max(data[side]["max_s"] / data[side]["min_s"] for side in ("dense", "patched"))
    assert (low, high) == (pytest.approx(data["speedup"] / noise), pytest.approx(data["speedup"] * noise))
    assert low <= data["speedup"] <= high
    assert data["recipe"]["select"]["density"] == 0.5
    # Two warm-up forwards and two measured ones.
    assert data["summary"]["sparse_calls"] == 4
    assert 0 < data["density"] <= 1
    assert data["finite"]
    assert any("dense_fraction" in note for note in data["notes"])


def test_bench_of_the_dense_recipe_is_bit_equal() -> None:
    data = run_json(*BENCH, "--recipe", "dense")
    assert data["relative_difference"] == 0
    assert data["density"] is None
    assert data["mean_density"] == 1


def test_bench_of_dense_against_dense_shows_no_difference() -> None:
    data = run_json(*BENCH[:-1], "7", "--recipe", "dense")
    low, high = data["speedup_range"]
    assert low <= 1 <= high


@pytest.mark.parametrize("recipe", ["pooled", "mass", "adaspa", "pooled;schedule.refresh_every=100"])
def test_bench_times_what_a_fresh_patch_computes(recipe: str) -> None:
    """A plan that outlives a forward is that of the same inputs."""
    data = run_json(*BENCH, "--recipe", recipe, "--set", "select.density=0.5", "--dtype", "fp32")
    assert data["repeat_difference"] == 0
    assert not any("fresh patch" in note for note in data["notes"])


def test_bench_says_when_a_kept_plan_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_accel.benchmarking import forward as forward_bench

    runs = iter(range(1, 100))

    def drifting(self: Any) -> None:
        import torch

        self.seconds.append(1.0)
        self.output = torch.full((2,), float(next(runs)))

    monkeypatch.setattr(forward_bench.Variant, "run", drifting)
    data = run_json(*BENCH)
    assert any("not what a fresh patch computes" in note for note in data["notes"])


def test_bench_as_text() -> None:
    result = run(*BENCH, "--backend", "reference")
    assert result.exit_code == 0, result.stderr
    words = ("speed-up", "over 2 of each, in turns", "1 of 30 layers", "reference (asked for by name)")
    for word in (*words, "relative difference"):
        assert word in result.stdout


def test_bench_of_a_whole_run_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_accel.benchmarking import whole_run

    # A text encoder of 5.7 billion weights is no test's.
    monkeypatch.setattr(whole_run, "_text_seconds", lambda *_: 0.25)
    result = run(*BENCH[:-2], "--pipeline", "--steps", "2", "--dense-steps", "1", "--recipe", "dense")
    assert result.exit_code == 0, result.stderr
    assert "0.50 s" in result.stdout  # two prompts
    assert "1 of 30 layers measured" in result.stdout
    assert "one of each: no spread" in result.stdout
    assert "1 dense steps were measured; 2 count by their mean." in " ".join(result.stdout.split())


def test_compiled_bench_runs_its_own_code() -> None:
    """torch.compile reuses code between modules: the patched model must not get the dense one's."""
    import dataclasses

    import torch

    from dit_accel import presets
    from dit_accel.benchmarking.forward import bench_forward
    from dit_accel.pipelines.architectures import architecture

    known = architecture("wan2.1-1.3b")
    known = dataclasses.replace(known, config={**known.config, "num_attention_heads": 2, "ffn_dim": 64})
    report = bench_forward(
        known,
        width=128,
        height=128,
        frames=9,
        recipe=presets.pooled(density=0.5),
        dtype=torch.float32,
        device=torch.device("cpu"),
        layers=12,
        repeats=2,
        compiler="eager",
    )
    assert report.summary.sparse_calls == 12 * 4
    assert 0 < report.relative_difference < 1


def test_generate_writes_a_video_and_reports(tmp_path: Path) -> None:
    recipe = ["--recipe", "pooled", "--set", "schedule.few_steps=0"]
    data = run_json(*GENERATE, *SMALL, *recipe, "--out", str(tmp_path / "cat.mp4"))
    assert data["files"] == {"out": str(tmp_path / "cat.mp4")}
    assert iio.imread(tmp_path / "cat.mp4", plugin="FFMPEG").shape == (5, 96, 96, 3)
    assert data["random_weights"]
    assert data["settings"]["steps"] == 3
    # 3 layers, 2 guidance branches; of 3 steps the first is dense.
    assert data["summary"]["sparse_calls"] == 3 * 2 * 2
    assert data["summary"]["dense_calls"] == {"dense phase": 3 * 2}
    assert 0 < data["density"] < data["mean_density"] <= 1
    assert data["seconds"] > 0


def test_generate_auto_stays_dense_for_a_short_sequence(tmp_path: Path) -> None:
    data = run_json(*GENERATE, *SMALL, "--out", str(tmp_path / "cat.mp4"))
    assert data["summary"]["sparse_calls"] == 0
    assert any("too few to gain" in reason for reason in data["summary"]["dense_calls"])
    assert data["summary"]["note"]


def test_generate_compares_with_dense(tmp_path: Path) -> None:
    out = tmp_path / "cat.mp4"
    data = run_json(*GENERATE, *SMALL, "--recipe", "dense", "--compare-dense", "--out", str(out))
    assert data["psnr_db"] == "inf"
    assert data["speedup"] == pytest.approx(data["dense_seconds"] / data["seconds"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat.dense.mp4", "cat.mp4"]
    sparse = ["--recipe", "pooled", "--set", "select.density=0.1", "--compare-dense"]
    data = run_json(*GENERATE, *SMALL, *sparse, "--out", str(out))
    assert 0 < data["psnr_db"] < 100
    assert data["recipe"]["select"]["density"] == 0.1


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Steps of every generation, and the side that it was of."""
    from dit_accel.patches.targets import handle_of
    from dit_accel.pipelines import generate as module

    seen: list[tuple[int, str]] = []
    really = module.generate

    def record(pipe: Any, prompt: str, **arguments: Any) -> Any:
        try:
            side = f"patch {id(handle_of(pipe))}"
        except ValueError:
            side = "dense"
        seen.append((arguments["steps"], side))
        return really(pipe, prompt, **arguments)

    monkeypatch.setattr(module, "generate", record)
    return seen


def test_both_sides_are_warmed_up_and_take_turns(runs: list[tuple[int, str]], tmp_path: Path) -> None:
    asked = ["--recipe", "dense", "--compare-dense", "--repeat", "3", "--out", str(tmp_path / "cat.mp4")]
    data = run_json(*GENERATE, *SMALL, *asked)
    assert [steps for steps, _ in runs] == [2, 2, 3, 3, 3, 3, 3, 3]
    sides = [side.split()[0] for _, side in runs]
    assert sides == ["dense", "patch", "dense", "patch", "patch", "dense", "dense", "patch"]
    turns = data["turns"]
    assert (turns["repeat"], turns["warm_up_steps_of_each_side"], turns["patched_for_each_run"]) == (3, 2, True)
    assert len(turns["dense"]["seconds"]) == len(turns["accelerated"]["seconds"]) == 3
    assert data["seconds"] == turns["accelerated"]["median_s"]
    # Each patch counts its own run alone: 3 layers, 2 branches, 3 steps.
    assert data["summary"]["dense_calls"] == {"recipe is dense": 18}
    low, high = data["speedup_range"]
    assert low <= data["speedup"] <= high
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat.dense.mp4", "cat.mp4"]


def test_one_run_of_each_has_no_spread(runs: list[tuple[int, str]], tmp_path: Path) -> None:
    result = run(*GENERATE, *SMALL, "--recipe", "dense", "--compare-dense", "--out", str(tmp_path / "cat.mp4"))
    assert result.exit_code == 0, result.stderr
    assert [steps for steps, _ in runs] == [2, 2, 3, 3]
    assert "2 untimed steps of each side, then one run of each, which has no spread" in " ".join(result.stdout.split())
    assert "note: nothing was accelerated" in result.stdout
    assert max(len(line) for line in result.stdout.splitlines() if str(tmp_path) not in line) <= 80
    assert " to " not in next(line for line in result.stdout.splitlines() if line.startswith("speed-up"))
    few = run_json(
        *GENERATE, *SMALL, "--steps", "1", "--recipe", "dense", "--compare-dense", "--out", str(tmp_path / "c.mp4")
    )
    assert few["turns"]["warm_up_steps_of_each_side"] == 1
    assert few["speedup_range"] is None
    sparse = run(*GENERATE, *SMALL, "--recipe", "pooled", "--compare-dense", "--out", str(tmp_path / "d.mp4"))
    assert "sparse calls at density" in sparse.stdout
    assert "nothing was accelerated" not in sparse.stdout


@pytest.mark.parametrize("recipe", ["mass", "pooled;schedule.refresh_every=100"])
def test_the_compared_clip_is_what_a_fresh_patch_gives(recipe: str, tmp_path: Path) -> None:
    """Of a recipe that keeps plans: nothing of the warm-up or of an earlier turn is in the clip."""
    import torch

    import dit_accel
    from dit_accel.cli.options import read_recipe
    from dit_accel.pipelines import load
    from dit_accel.pipelines.generate import generate, save

    # Plans are made at step 2 or 3, in a warm-up of two steps at 0 or 1: they would serve the run after it.
    changes = ["select.density=0.1", "schedule.dense_fraction=0.5", "schedule.few_steps=0"]
    asked = [
        "--size",
        "96x96",
        "--frames",
        "5",
        "--steps",
        "6",
        "--guidance",
        "1",
        "--recipe",
        ";".join([recipe, *changes]),
    ]
    data = run_json(*GENERATE, *asked, "--dtype", "fp32", "--compare-dense", "--out", str(tmp_path / "both.mp4"))
    pipe = load("random-wan", dtype=torch.float32)
    with dit_accel.patch(pipe, read_recipe(recipe, changes)) as handle:
        alone = generate(pipe, "a cat", width=96, height=96, frames=5, steps=6, guidance=1.0)
    files = [save(alone, tmp_path / "alone.mp4"), tmp_path / "both.mp4"]
    first, second = (iio.imread(file, plugin="FFMPEG") for file in files)
    assert (first == second).all()
    for name in ("sparse_calls", "dense_calls", "density"):
        assert data["summary"][name] == getattr(handle.summary(), name)


def test_what_cannot_be_patched_is_refused_before_the_dense_side_runs(runs: list[tuple[int, str]]) -> None:
    result = run(*GENERATE, *SMALL, "--recipe", "paro", "--compare-dense")
    assert result.exit_code == 2
    assert "calibrat" in result.stderr
    assert runs == []


def test_generate_with_an_adapter(tmp_path: Path) -> None:
    """The one that comes with the embedded model; one for another model is refused by name."""
    asked = ["--prompt", "a red car in a forest", "--device", "cpu", "--dtype", "fp32", "--size", "64x64"]
    asked += ["--frames", "5", "--steps", "1", "--guidance", "1", "--out", str(tmp_path / "car.mp4")]
    data = run_json("generate", "embedded", *asked, "--adapter", "sla-0.1")
    assert data["adapter"] == "sla-0.1"
    assert data["recipe"]["compensate"]["kind"] == "linear"
    assert data["summary"]["sparse_calls"] == 8
    folder = str(builtins()["embedded"].adapters["sla-0.1"])
    refused = run(*GENERATE, *SMALL, "--adapter", folder)
    assert refused.exit_code == 2
    words = "does not fit WanTransformer3DModel: it is for self-attention layers 8, the model has 3"
    assert words in " ".join(refused.stderr.split())


def test_generate_as_text(tmp_path: Path) -> None:
    result = run(*GENERATE, *SMALL, "--compare-dense", "--recipe", "window", "--out", str(tmp_path / "cat"))
    assert result.exit_code == 0, result.stderr
    for word in ("speed-up", "PSNR", "sparse calls at density", "weights are random"):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*BENCH, "--steps", "3"], "--steps goes with --pipeline, got it without"),
        ([*BENCH, "--graphs"], "--graphs goes with --pipeline, got it without"),
        ([*BENCH, "--pipeline", "--batch", "2"], "--pipeline runs one clip, got --batch 2"),
        ([*BENCH, "--pipeline", "--vae", "fast"], "vae takes some of"),
        ([*BENCH, "--pipeline", "--arch", "ltx", "--frames", "9"], "Whole runs are known of wan2.1-1.3b"),
        (["bench", "--arch", "sdxl"], "Unknown architecture 'sdxl'; known are wan2.1-1.3b,"),
        ([*BENCH, "--size", "64"], "--size must be WIDTHxHEIGHT in pixels, such as 832x480, got '64'"),
        ([*BENCH, "--size", "0x64"], "got '0x64'"),
        ([*BENCH, "--size", "72x64"], "multiples of 16, got 72x64"),
        ([*BENCH, "--frames", "6"], "multiple of 4 frames plus one"),
        ([*BENCH, "--recipe", "magic"], "Unknown recipe 'magic'; known are dense, window, pooled"),
        ([*BENCH, "--set", "select.foo=1"], "has no field 'foo'; its fields are density"),
        ([*BENCH, "--set", "choose.foo=1"], "Unknown axis 'choose'; the axes are order, select"),
        ([*BENCH, "--set", "select.density"], "--set must be AXIS.FIELD=VALUE"),
        ([*BENCH, "--set", "select.density=2"], "must lie in (0, 1], got 2"),
        ([*BENCH, "--recipe", "window", "--set", "select.window=(9,9,9)"], "the grid has 2 in frames"),
        ([*BENCH, "--backend", "cuda"], "Unknown backend 'cuda'; known are auto"),
        ([*BENCH, "--dtype", "fp8"], "--dtype must be one of fp32, fp16, bf16, got 'fp8'"),
        ([*BENCH, "--device", "tpu"], "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        ([*BENCH, "--device", "cuda:99"], "--device cuda:99 is not there"),
        ([*BENCH, "--repeats", "0"], "repeats must be at least 1, got 0"),
        ([*BENCH, "--batch", "0"], "batch must be at least 1, got 0"),
        ([*BENCH, "--dense-backend", "_native_cudnn"], "dense backend '_native_cudnn' cannot run in"),
        ([*BENCH, "--dense-backend", "_native_efficient"], "was found); leave it out for the fastest that runs."),
        ([*BENCH, "--dense-backend", "cudnn"], "Unknown dense backend 'cudnn'; diffusers knows flash,"),
        ([*BENCH, "--dense-backend", "xformers"], "xformers"),
        ([*BENCH, "--out", "/proc/no/bench.json"], "Cannot write in /proc/no"),
        ([*GENERATE[:1], "no-such-model", *GENERATE[2:]], "neither a built-in model"),
        ([*GENERATE, "--size", "huge"], "--size must be"),
        ([*GENERATE, "--adapter", "sla"], "There is no adapter 'sla': it is no folder, and the model comes with none"),
        ([*GENERATE, "--adapter", "sla", "--recipe", "sla"], "--adapter brings its own recipe, got --recipe sla"),
        ([*GENERATE, *SMALL, "--out", "film.png"], "saved as .mp4 or .gif or .webp; got film.png"),
        ([*GENERATE, *SMALL, "--repeat", "3"], "--repeat goes with --compare-dense, got --repeat 3 alone"),
    ],
)
def test_errors_are_one_sentence(arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    error = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(error) == 1
    assert words in error[0]
    assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback() -> None:
    result = run("bench", "--arch", "sdxl", "--debug")
    assert isinstance(result.exception, ValueError)
