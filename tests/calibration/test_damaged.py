"""Calibrations that were cut off, edited or mixed up: one sentence that names the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from dit_accel import CalibrationArtifact, calibrate, presets
from dit_accel.patches.artifact import read_tensors, write_tensors
from tests.tiny import TINY

RECIPE = presets.pooled(density=0.5).with_fields({"select.block": (32, 32)})
PART = ("transformers", "transformer")


def run(path: Path, **options: Any) -> CalibrationArtifact:
    pipe = TINY["wan"].build(1)
    pipe.set_progress_bar_config(disable=True)
    call = TINY["wan"].call(torch.Generator().manual_seed(0))
    prompts = [call, call]
    return calibrate(pipe, prompts, RECIPE, out=path, generate_kwargs={"num_inference_steps": 2}, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "c.safetensors"
    run(path)
    return path


@pytest.fixture(scope="module")
def beginning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an interrupted calibration leaves."""
    path = tmp_path_factory.mktemp("interrupted") / "c.safetensors"

    def stop(state: Any) -> None:
        if state.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(path, progress=stop)
    return path.with_name("c.safetensors.partial")


def put(value: Any, *names: str) -> Callable[[Any], Any]:
    """An edit of a header that puts a value in a place."""

    def edit(header: Any) -> Any:
        part = header
        for name in names[:-1]:
            part = part[name]
        part[names[-1]] = value
        return header

    return edit


def take(*names: str) -> Callable[[Any], Any]:
    """An edit of a header that takes a part away."""

    def edit(header: Any) -> Any:
        part = header
        for name in names[:-1]:
            part = part[name]
        del part[names[-1]]
        return header

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda header: [1], "no calibration file: its header is a list"),
        (lambda header: None, "no calibration file: its header is a NoneType"),
        (take("format"), "no calibration of version"),
        (take("recipe"), "a damaged calibration: it lacks 'recipe'"),
        (take(*PART), "a damaged calibration: it is for no transformer"),
        (take(*PART, "edges"), "a damaged calibration: it lacks 'edges'"),
        (put([], "transformers"), "a damaged calibration: "),
        (put({"other": {}}, "transformers"), "a damaged calibration: it lacks 'other.masks'"),
        (put([3, 6], *PART, "grid"), "a damaged calibration: "),
        (put([3, 6, -7], *PART, "grid"), "a damaged calibration: .*must be counts"),
        (put([0, 32], *PART, "block"), "a damaged calibration: .*must be counts"),
        (put("126", *PART, "seq_len"), "a damaged calibration: .*must be counts"),
        (put([0.5, 0.9], *PART, "edges"), "a damaged calibration: .*edges must fall"),
        (put({"layers": 2}, *PART, "fingerprint"), "a damaged calibration: "),
        (put([], *PART, "fingerprint"), "a damaged calibration: "),
        (put(3, *PART, "fingerprint", "layers"), "masks of 3 layers and 2 heads are expected"),
        (put({"select": {"kind": "fast"}}, *PART, "recipe"), "a damaged calibration: Unknown select 'fast'"),
    ],
)
def test_a_damaged_header(whole, tmp_path, edit, words) -> None:
    header, tensors = read_tensors(whole)
    write_tensors(tmp_path / "c.safetensors", tensors, edit(header))
    with pytest.raises(ValueError, match=rf"c\.safetensors is .*{words}") as caught:
        CalibrationArtifact.load(tmp_path / "c.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_truncated_file(whole, tmp_path, length) -> None:
    (tmp_path / "c.safetensors").write_bytes(whole.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"c\.safetensors is no calibration file: "):
        CalibrationArtifact.load(tmp_path / "c.safetensors")


@pytest.mark.parametrize("what", ["absent", "folder"])
def test_no_file(tmp_path, what) -> None:
    if what == "folder":
        (tmp_path / "c.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"There is no calibration at .*c\.safetensors"):
        CalibrationArtifact.load(tmp_path / "c.safetensors")


def test_a_full_disk_keeps_the_old_file(whole, tmp_path, monkeypatch) -> None:
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise SafetensorError("No space left on device")

    artifact = CalibrationArtifact.load(whole)
    path = tmp_path / "c.safetensors"
    path.write_bytes(whole.read_bytes())
    monkeypatch.setattr("dit_accel.tensor_files.save_file", full)
    with pytest.raises(ValueError, match=r"Cannot write .*c\.safetensors: No space left on device"):
        artifact.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    "edit",
    [
        lambda header: [],
        take("asked"),
        take("counts"),
        put("x", "finished"),
        put({}, "counts"),
        put([], "layouts"),
        put({"transformer": []}, "orders"),
    ],
)
def test_a_damaged_beginning(beginning, tmp_path, edit) -> None:
    header, tensors = read_tensors(beginning)
    write_tensors(tmp_path / "c.safetensors.partial", tensors, edit(header))
    with pytest.raises(ValueError, match=r"partial is (the damaged beginning of a calibration|no calibration file)"):
        run(tmp_path / "c.safetensors")


def test_the_beginning_of_another_calibration(beginning, tmp_path) -> None:
    header, tensors = read_tensors(beginning)
    write_tensors(tmp_path / "c.safetensors.partial", tensors, put(7, "asked", "buckets")(header))
    with pytest.raises(ValueError, match="the beginning of another calibration: buckets = 7, got 4"):
        run(tmp_path / "c.safetensors")
