"""A folder of samples knows what made them: the same settings go on, others are refused by name or start over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_accel.training.data import generate_samples
from dit_accel.training.lora import add_lora
from dit_accel.training.origin import RECORD
from dit_accel.training.samples import LatentFolder, Sample, read_sample, save_sample
from tests.tiny import TINY
from tests.training.samples import files_up_to, tiny_pipe

SETTINGS = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 1, "guidance_scale": 1.0}


def call(seed: int = 0) -> dict[str, Any]:
    """A prompt of a pipeline without text encoder."""
    return {"prompt_embeds": torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(seed))}


def make(folder: Path, prompts: Any = None, pipe: Any = None, seed: int = 0, **changes: Any) -> Path:
    start_over = changes.pop("start_over", False)
    prompts = [call(0), call(1)] if prompts is None else prompts
    return generate_samples(
        pipe or tiny_pipe(), prompts, folder, settings=SETTINGS | changes, seed=seed, start_over=start_over
    )


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}


def trained_a_little() -> Any:
    """A step of training changes weights by less than a dtype does."""
    pipe = tiny_pipe()
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter += 1e-5
    return pipe


def with_lora() -> Any:
    pipe = tiny_pipe()
    add_lora(pipe.transformer, ["blocks.0.attn1.to_q"], 2, 2)
    return pipe


def shifted() -> Any:
    pipe = tiny_pipe()
    pipe.scheduler.register_to_config(shift=5.0)
    return pipe


def in_half() -> Any:
    pipe = tiny_pipe()
    pipe.transformer.to(torch.bfloat16)
    return pipe


def test_samples_of_the_same_settings_are_kept(tmp_path):
    make(tmp_path)
    before = stamps(tmp_path)
    make(tmp_path)
    assert stamps(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 64}, r"made with width = 48, got 64"),
        ({"num_frames": 9}, r"num_frames = 5, got 9"),
        ({"num_inference_steps": 2}, r"num_inference_steps = 1, got 2"),
        ({"guidance_scale": 3.0}, r"guidance_scale = 1\.0, got 3\.0"),
        ({"max_sequence_length": 8}, r"max_sequence_length = nothing, got 8"),
        ({"seed": 7}, r"seed = 0, got 7"),
        ({"prompts": [call(0), call(5)]}, r"generated-000001\.prompt\.prompt_embeds = 'sha256"),
        ({"prompts": [call(0)]}, r"not among the 1 asked for \(generated-000001, 1 in all\)"),
        ({"pipe": TINY["wan2.2"].build}, r"made by a pipeline without transformer_2"),
        ({"pipe": lambda: tiny_pipe(layers=3)}, r"transformer\.layers = 2, got 3"),
        ({"pipe": trained_a_little}, r"other weights of the transformer"),
        ({"pipe": with_lora}, r"other LoRA layers of the transformer"),
        ({"pipe": shifted}, r"scheduler\.config\.shift = 3\.0, got 5\.0"),
        ({"pipe": in_half}, r"dtype = 'torch\.float32', got 'torch\.bfloat16'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_samples_of_other_settings_are_refused_by_name(tmp_path, changes, message):
    make(tmp_path)
    before = stamps(tmp_path)
    if "pipe" in changes:
        changes = changes | {"pipe": changes["pipe"]()}
    with pytest.raises(ValueError, match=rf"holds samples .*{message}.*(--out).*start over"):
        make(tmp_path, **changes)
    assert stamps(tmp_path) == before


def test_starting_over_sets_the_old_samples_aside(tmp_path):
    make(tmp_path)
    old = (tmp_path / "generated-000000.safetensors").read_bytes()
    make(tmp_path, [call(0)], width=64, start_over=True)
    assert [sample.latents.shape[-1] for sample in LatentFolder(tmp_path)] == [8]
    assert (tmp_path / "earlier-1" / "generated-000000.safetensors").read_bytes() == old
    make(tmp_path, seed=3, start_over=True)
    assert len(LatentFolder(tmp_path)) == 2
    assert len(LatentFolder(tmp_path / "earlier-2")) == 1
    # The same settings again: nothing is made twice.
    before = stamps(tmp_path)
    make(tmp_path, seed=3, start_over=True)
    assert stamps(tmp_path) == before


def test_more_prompts_add_samples(tmp_path):
    make(tmp_path, [call(0)])
    first = stamps(tmp_path)["generated-000000.safetensors"]
    make(tmp_path, [call(0), call(1)])
    assert stamps(tmp_path)["generated-000000.safetensors"] == first
    assert len(LatentFolder(tmp_path)) == 2


def test_an_interrupted_making_goes_on_only_with_its_settings(tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_samples(tiny_pipe(), [call(0), call(1)], tmp_path, settings=SETTINGS, progress=stop)
    first = stamps(tmp_path)["generated-000000.safetensors"]
    with pytest.raises(ValueError, match="width = 48, got 64"):
        make(tmp_path, width=64)
    make(tmp_path)
    assert stamps(tmp_path)["generated-000000.safetensors"] == first
    assert len(LatentFolder(tmp_path)) == 2


@pytest.mark.parametrize("record", [None, "{", "[]", '{"models": {"a": 1}, "settings": {}, "samples": {}}'])
def test_samples_that_nobody_vouches_for_are_refused(tmp_path, record):
    save_sample(Sample("generated-000000", torch.zeros(1), 1.0, {}), tmp_path / "generated-000000.safetensors")
    if record is not None:
        (tmp_path / RECORD).write_text(record)
    with pytest.raises(ValueError, match=r"no readable samples\.json says what made them"):
        make(tmp_path)


def test_a_sample_put_among_the_others_is_refused(tmp_path):
    make(tmp_path)
    save_sample(Sample("mine", torch.zeros(1), 1.0, {}), tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match=r"not among the 2 asked for \(mine"):
        make(tmp_path)


def test_a_damaged_sample_is_made_again(tmp_path):
    make(tmp_path)
    path = tmp_path / "generated-000001.safetensors"
    whole = read_sample(path).latents.clone()
    path.write_bytes(path.read_bytes()[:-100])
    make(tmp_path)
    assert torch.equal(read_sample(path).latents, whole)


def test_what_a_killed_process_left_half_written_is_no_sample(tmp_path):
    make(tmp_path)
    (tmp_path / ".dit_accel-0123abcd.safetensors").write_bytes(b"half")
    make(tmp_path)
    data = LatentFolder(tmp_path)
    assert len(data) == 2
    assert data.skipped == []


def test_no_prompts_and_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="no prompt"):
        make(tmp_path / "new", [])
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="Cannot write in"):
        make(tmp_path / "file")


def test_a_full_disk_leaves_whole_samples_and_goes_on_later(tmp_path):
    # Larger than the record, which must still get through.
    prompts = [{"prompt_embeds": torch.zeros(1, 512, 32)}] * 2
    with files_up_to(40_000), pytest.raises(ValueError, match=r"Cannot write .*generated-000000\.safetensors"):
        make(tmp_path, prompts)
    assert [path.name for path in tmp_path.iterdir()] == [RECORD]
    make(tmp_path, prompts)
    assert len(LatentFolder(tmp_path)) == 2


def test_the_record_is_utf8_whatever_the_prompt(tmp_path, monkeypatch):
    pipe = TINY["wan"].build()
    embeds = torch.zeros(1, 8, 32)
    monkeypatch.setattr(pipe, "encode_prompt", lambda *args, **kwargs: (embeds, embeds))
    make(tmp_path, ["ein Äffchen, 三"], pipe)
    record = json.loads((tmp_path / RECORD).read_text(encoding="utf-8"))
    assert record["samples"] == {"generated-000000": {"prompt": "ein Äffchen, 三"}}
    assert "Äffchen" in (tmp_path / RECORD).read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"generated-000000\.prompt = 'ein Äffchen, 三', got 'ein Affe'"):
        make(tmp_path, ["ein Affe"], pipe)
