"""What a user may get wrong on the command line: one sentence, exit code 2, and nothing made of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dit_accel.cli import model as cli_model
from dit_accel.pipelines.builtin import builtins
from tests.cli.test_commands import run

SIZE = ["--device", "cpu", "--size", "64x64", "--frames", "5", "--steps", "2"]
GENERATE = ["generate", "random-wan", "--prompt", "a cat", *SIZE]
CALIBRATE = ["calibrate", "random-wan", "--recipe", "pooled", *SIZE]
SEARCH = ["search", "random-wan", "--density", "0.9", "--samples", "1", *SIZE]
COMPARE = ["compare", "random-wan", *SIZE]
INSPECT = ["inspect", "random-wan", "--prompt", "a cat", *SIZE]
HUGE = "order.shape=(1000000000,1000000000,1000000000)"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with things in the way."""
    monkeypatch.chdir(tmp_path)
    for name in ("dir", "dir.mp4", "cat.dense.mp4", "dir.json"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "latin.txt").write_bytes("ein grünes Haus\n".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "broken.safetensors").write_text("no head")
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "odd.json").write_text('{"select": {"kind": "pooled", "speed": 3}}')
    (tmp_path / "cut.json").write_text('{"select": {"kind": "poo')
    return tmp_path


def refused(*arguments: str) -> str:
    """The sentence that a command ends with."""
    result = run(*arguments)
    assert result.exit_code == 2, result.stderr
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    # typer draws a box around what it finds itself.
    said = [line for line in result.stderr.splitlines() if line.startswith("Error: ") or "─ Error ─" in line]
    assert len(said) == 1, result.stderr
    return " ".join(result.stderr.replace("│", "").split())


def test_helper_sees_an_error_that_is_none(folder: Path) -> None:
    with pytest.raises(AssertionError):
        refused("--version")


WITHOUT_A_MODEL = [
    # Where it is written.
    ([*GENERATE, "--out", "dir.mp4"], "dir.mp4 is a folder"),
    ([*GENERATE, "--out", "dir"], "dir is a folder"),
    ([*GENERATE, "--out", "."], ". is a folder"),
    ([*GENERATE, "--out", ""], ". is a folder"),
    ([*GENERATE, "--out", "/proc/no/x.mp4"], "Cannot write in /proc/no"),
    ([*GENERATE, "--out", "file/x.mp4"], "Cannot write in file"),
    ([*GENERATE, "--out", "x.jpg"], "saved as .mp4 or .gif or .webp; got x.jpg"),
    ([*GENERATE, "--out", "x.png"], "saved as .mp4 or .gif or .webp; got x.png"),
    ([*GENERATE, "--out", "n" * 300 + ".mp4"], "File name too long"),
    ([*GENERATE, "--compare-dense", "--out", "cat.mp4"], "cat.dense.mp4 is a folder"),
    ([*CALIBRATE, "--out", "dir"], "dir is a folder"),
    ([*CALIBRATE, "--out", "/dev/null"], "/dev/null is not a regular file"),
    ([*CALIBRATE, "--out", "/proc/no/c"], "Cannot write in /proc/no"),
    ([*SEARCH, "--out", "found.txt"], "--out must end in .json, got 'found.txt'"),
    ([*SEARCH, "--out", "dir.json"], "dir.json is a folder"),
    ([*SEARCH, "--out", "/proc/no/f.json"], "Cannot write in /proc/no"),
    ([*INSPECT, "--out", "file"], "Cannot write in file"),
    ([*INSPECT, "--out", "/proc/no"], "Cannot write in /proc/no"),
    ([*COMPARE, "--out", "file"], "Cannot write in file"),
    ([*COMPARE, "--out", "/proc/no"], "Cannot write in /proc/no"),
    # Numbers.
    ([*GENERATE, "--size", "00x64"], "--size must be WIDTHxHEIGHT in pixels, such as 832x480"),
    ([*GENERATE, "--size", "64x99999999999999999999"], "--size must be at most 32768 pixels a side"),
    ([*GENERATE, "--size", ""], "--size must be WIDTHxHEIGHT"),
    ([*GENERATE, "--seed", str(10**22)], "--seed must lie in 0 to 4611686018427387904"),
    ([*GENERATE, "--seed", "-1"], "--seed must lie in 0 to"),
    ([*SEARCH, "--seed", str(10**22)], "--seed must lie in 0 to"),
    ([*INSPECT, "--seed", "-1"], "--seed must lie in 0 to"),
    ([*COMPARE, "--seed", "1", "--seed", "-1"], "--seed must lie in 0 to"),
    ([*COMPARE, "--guidance", "nan"], "--guidance must be finite, got nan"),
    ([*GENERATE, "--frames", "0"], "--frames"),
    ([*GENERATE, "--frames", str(10**22)], "--frames"),
    ([*GENERATE, "--steps", "-3"], "--steps"),
    ([*GENERATE, "--steps", str(10**22)], "--steps"),
    ([*GENERATE, "--guidance", "nan"], "--guidance must be finite, got nan"),
    ([*CALIBRATE, "--guidance", "inf"], "--guidance must be finite, got inf"),
    ([*CALIBRATE, "--buckets", "0"], "--buckets"),
    ([*SEARCH, "--density", "nan"], "mean_density must lie in (0, 1], got nan"),
    (["search", "random-wan", "--max-error", "nan"], "max_error must be above 0 and finite, got nan"),
    # Recipes.
    ([*GENERATE, "--recipe", ""], "Unknown recipe ''; known are dense"),
    ([*GENERATE, "--recipe", "gone.json"], "There is no recipe file gone.json"),
    ([*GENERATE, "--recipe", "dir.json"], "There is no recipe file dir.json"),
    ([*GENERATE, "--recipe", "empty.json"], "empty.json holds no recipe: it has no select"),
    ([*GENERATE, "--recipe", "list.json"], "list.json holds no recipe: one object of six axes is expected"),
    ([*GENERATE, "--recipe", "odd.json"], "odd.json holds no recipe: Pooled (select) has no field 'speed'"),
    ([*GENERATE, "--recipe", "cut.json"], "cut.json holds no recipe: Unterminated string"),
    ([*GENERATE, "--recipe", "window", "--set", HUGE], "order.shape must be finite and below"),
    ([*GENERATE, "--recipe", "pooled", "--set", "select.density=[bold]"], "must be a Python literal"),
    ([*GENERATE, "--recipe", "carried:density=0.1"], "or on the command line 'carried; select.density=0.2'"),
    ([*CALIBRATE, "--recipe", "na"], "nothing to calibrate"),
    ([*CALIBRATE, "--recipe", "carried"], "Carried keeps something of dense steps that make plans"),
    ([*SEARCH, "--recipe", "na"], "has no density per head"),
    ([*SEARCH, "--recipe", "carried"], "Carried adds what dense steps of a run kept"),
    ([*SEARCH, "--order", "xyz"], "order.axes must hold fhw"),
    # Files to read.
    ([*CALIBRATE, "--prompts-file", "latin.txt"], "latin.txt must be UTF-8 text: invalid"),
    ([*CALIBRATE, "--prompts-file", "empty.txt"], "empty.txt must hold a prompt, one a line, got none"),
    ([*CALIBRATE, "--prompts-file", "dir"], "--prompts-file dir cannot be read: Is a directory"),
    ([*COMPARE, "--prompts-file", "latin.txt"], "latin.txt must be UTF-8 text: invalid"),
    ([*COMPARE, "--prompts-file", "empty.txt"], "empty.txt must hold a prompt, one a line, got none"),
    ([*SEARCH, "--prompts-file", "gone.txt"], "gone.txt cannot be read: No such file or directory"),
    ([*GENERATE, "--calibration", "gone"], "There is no calibration at gone"),
    ([*GENERATE, "--calibration", "file"], "file is no calibration file"),
    ([*GENERATE, "--adapter", "gone"], "There is no adapter 'gone'"),
    ([*GENERATE, "--adapter", "dir"], "dir holds no readable adapter"),
    ([*GENERATE, "--adapter", "file"], "file is no checkpoint: the name of one ends in .safetensors, .pth"),
    ([*GENERATE, "--adapter", "broken.safetensors"], "broken.safetensors cannot be read"),
    # Where it runs.
    ([*GENERATE, "--device", "cuda:x"], "--device must be cpu, cuda or cuda:N, got 'cuda:x'"),
    ([*GENERATE, "--device", "cpu:5"], "--device must be cpu, cuda or cuda:N, got 'cpu:5'"),
    ([*GENERATE, "--device", "cuda:9999"], "--device cuda:9999 is not there"),
    ([*GENERATE, "--device", ""], "--device must be cpu, cuda or cuda:N, got ''"),
    ([*INSPECT, "--dtype", "fp64"], "--dtype must be one of fp32, fp16, bf16, got 'fp64'"),
    ([*GENERATE, "--backend", "cuda"], "Unknown backend 'cuda'; known are auto"),
    (["frobnicate"], "No such command 'frobnicate'"),
    (["generate"], "Give --prompt or --prompts, got neither"),
]


@pytest.mark.parametrize(("arguments", "words"), WITHOUT_A_MODEL, ids=lambda value: str(value)[-60:])
def test_what_needs_no_model_is_refused_before_it_is_loaded(folder, monkeypatch, arguments, words) -> None:
    monkeypatch.setattr("dit_accel.pipelines.loading.load", lambda *a, **k: pytest.fail("the model was loaded"))
    before = sorted(folder.rglob("*"))
    assert words in refused(*arguments)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*GENERATE, "--size", "72x64"], "WanPipeline needs a width that is a multiple of 16, got 72"),
        ([*CALIBRATE, "--size", "64x100"], "WanPipeline needs a height that is a multiple of 16, got 100"),
        ([*SEARCH, "--size", "1x1"], "WanPipeline needs a width that is a multiple of 16, got 1"),
        ([*COMPARE, "--size", "64x100"], "WanPipeline needs a height that is a multiple of 16, got 100"),
        ([*INSPECT, "--size", "64x16384"], "WanPipeline needs a height of at most 8192, got 16384"),
        ([*GENERATE, "--frames", "99999"], "WanPipeline makes at most 4093 frames, got 99999"),
        ([*INSPECT, "--at-step", "9"], "--at-step must lie in 0 to 1, of 2 steps, got 9"),
        ([*INSPECT, "--at-step", "0", "--at-step", "-1"], "--at-step must lie in 0 to 1, of 2 steps, got -1"),
        ([*INSPECT, "--layer", "3"], "--layer must lie in 0 to 2, of 3 layers, got 3"),
        ([*SEARCH, "--density", "0.01", "--set", "select.block=(32,32)"], "mean_density must lie in [0."),
        (["generate", "no-such-model", "--prompt", "x"], "neither a built-in model"),
        (["generate", "dir", "--prompt", "x"], "The folder dir holds no pipeline"),
        (["generate", "", "--prompt", "x"], "holds no pipeline"),
        (["generate", "/etc/passwd", "--prompt", "x"], "nor a folder, nor a hub id"),
        (["generate", "nobody/nothing", "--prompt", "x"], "'nobody/nothing' could not be loaded"),
    ],
)
def test_what_only_the_model_knows_is_refused_before_it_runs(folder, monkeypatch, arguments, words) -> None:
    monkeypatch.setattr("diffusers.FlowMatchEulerDiscreteScheduler.step", lambda *a, **k: pytest.fail("a step ran"))
    assert words in refused(*arguments)


@pytest.mark.parametrize(
    ("backend", "recipe", "words"),
    [
        ("triton", "pooled", "the triton kernels need a CUDA device, got cpu"),
        ("triton", "auto", "the triton kernels need a CUDA device, got cpu"),
        ("triton", "sage", "the triton kernels need a CUDA device, got cpu"),
        ("fa4", "pooled", "flash-attn-4"),
        ("fa4", "sage", "cannot run quantized attention here"),
    ],
)
def test_a_named_backend_that_cannot_run_is_refused_also_where_nothing_would(
    folder, monkeypatch, backend, recipe, words
) -> None:
    """The clip is so short that `auto` would stay dense."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr("dit_accel.pipelines.loading.load", lambda *a, **k: pytest.fail("the model was loaded"))
    assert words in refused(*GENERATE, "--recipe", recipe, "--backend", backend)


def test_an_adapter_s_recipe_is_asked_too(folder, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    arguments = ["generate", "embedded", "--prompt", "x", *SIZE, "--adapter", "sla-0.1", "--backend", "triton"]
    assert "the triton kernels need a CUDA device, got cpu" in refused(*arguments)


def card() -> dict[str, Any]:
    path = builtins()["embedded"].adapters["sla-0.1"] / "adapter.json"
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def without(name: str) -> Callable[[], Any]:
    return lambda: {key: value for key, value in card().items() if key != name}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: [], "is damaged: adapter.json holds a list, not an object"),
        (lambda: None, "is damaged: adapter.json holds a NoneType, not an object"),
        (lambda: {"format": 1}, "is damaged: adapter.json has no recipe"),
        (without("recipe"), "is damaged: adapter.json has no recipe"),
        (without("backbone"), "is damaged: adapter.json has no backbone"),
        (lambda: card() | {"base": []}, "is damaged: "),
        (lambda: card() | {"base": {"transformer": {"layers": 3}}}, "is damaged: "),
        (lambda: card() | {"base": {}}, "is damaged: "),
        (lambda: card() | {"backbone": "lora", "lora": 3}, "is damaged: "),
        (lambda: card() | {"backbone": ["full"]}, "is damaged: adapter.json has a backbone of type list"),
        (lambda: card() | {"recipe": []}, "is damaged: "),
        (lambda: card() | {"recipe": {"select": {"kind": "fast"}}}, "is damaged: Unknown select 'fast'"),
        (lambda: card() | {"recipe": {"select": 3}}, "is damaged: "),
    ],
)
def test_a_damaged_card_is_refused_before_the_model_is_loaded(folder, monkeypatch, make, words) -> None:
    monkeypatch.setattr("dit_accel.pipelines.loading.load", lambda *a, **k: pytest.fail("the model was loaded"))
    save_file({"x": torch.zeros(1)}, folder / "dir" / "adapter.safetensors")
    (folder / "dir" / "adapter.json").write_text(json.dumps(make()))
    assert words in refused(*GENERATE, "--adapter", "dir")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_or_no_safetensors_is_refused(folder, content) -> None:
    save_file({"x": torch.zeros(1)}, folder / "dir" / "adapter.safetensors")
    (folder / "dir" / "adapter.json").write_bytes(content)
    assert "dir holds no readable adapter" in refused(*GENERATE, "--adapter", "dir")
    (folder / "dir" / "adapter.json").write_text(json.dumps(card()))
    (folder / "dir" / "adapter.safetensors").write_bytes(content)
    assert "dir holds no readable adapter" in refused(*GENERATE, "--adapter", "dir")


@pytest.mark.parametrize("name", ["x", "transformer/scale/gone", "transformer/delta/blocks.0.attn1.to_q.weight"])
def test_tensors_that_are_not_those_of_the_card_are_refused(folder, name) -> None:
    save_file({name: torch.zeros(1)}, folder / "dir" / "adapter.safetensors")
    (folder / "dir" / "adapter.json").write_text(json.dumps(card()))
    arguments = ["generate", "embedded", "--prompt", "x", "--dtype", "fp32", *SIZE, "--adapter", "dir"]
    assert "adapter in dir" in refused(*arguments)


@pytest.mark.parametrize("error", [KeyError("vae"), AttributeError("no vae"), TypeError("not a vae")])
def test_a_damaged_model_is_one_sentence(folder, monkeypatch, error) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("dit_accel.pipelines.loading.load", load)
    assert "'random-wan' could not be loaded, its files may be damaged" in refused(*GENERATE)


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"_class_name": "Nope"}', '{"_class_name": 3}', "\xff"])
def test_the_index_of_a_model_may_be_damaged(folder, text) -> None:
    (folder / "dir" / "model_index.json").write_text(text, encoding="latin-1")
    assert cli_model.will_make_video("dir", None) is None
    refused("generate", "dir", "--prompt", "x", *SIZE)


def test_memory_that_is_not_there_is_one_sentence(folder, monkeypatch) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        raise MemoryError("Unable to allocate 1.00 EiB")

    monkeypatch.setattr("dit_accel.pipelines.loading.load", load)
    assert "Unable to allocate 1.00 EiB" in refused(*GENERATE)
