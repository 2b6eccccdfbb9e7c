"""A folder knows which training is in it: a new one is kept apart, and only the same one goes on from a checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_accel.training.checkpoints import PROGRESS, newest_checkpoint
from dit_accel.training.config import FinetuneConfig
from dit_accel.training.finetune import finetune
from dit_accel.training.fitness import refuse_unfit
from dit_accel.training.objective import OBJECTIVES
from dit_accel.training.samples import Sample
from tests.training.samples import SLA, files_up_to, samples, tiny_pipe
from tests.training.test_origin import in_half, shifted, trained_a_little

CONFIG = FinetuneConfig(steps=2, learning_rate=1e-3, evaluate_samples=1, checkpoint_every=1)


def train(
    out: Path, pipe: Any = None, recipe: Any = SLA, data: Any = None, resume: bool = False, **changes: Any
) -> Any:
    config = replace(CONFIG, **changes)
    return finetune(pipe or tiny_pipe(), recipe, data or samples(), out, config, resume=resume)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rates(out: Path) -> dict[str, float]:
    """The learning rate that each checkpoint of a folder was trained with."""
    found = sorted((out / "checkpoints").iterdir())
    return {path.name: json.loads((path / PROGRESS).read_text())["config"]["learning_rate"] for path in found}


@pytest.mark.parametrize("steps", [1, 4])
def test_a_new_training_keeps_its_own_checkpoints_and_sets_the_old_ones_aside(steps, tmp_path, caplog):
    train(tmp_path, steps=3)
    old = {name: content for name, content in contents(tmp_path).items() if "tfevents" not in name}
    train(tmp_path, steps=steps, learning_rate=1e-2)
    kept = [f"step-{step:07d}" for step in range(max(1, steps - 1), steps + 1)]
    assert rates(tmp_path) == dict.fromkeys(kept, 1e-2)
    assert len(json.loads((tmp_path / "curves.json").read_text())["steps"]) == steps
    assert contents(tmp_path / "earlier-1").items() >= old.items()
    assert len(list(tmp_path.glob("tensorboard/events*"))) == 1
    assert f"An earlier training in {tmp_path} was moved to {tmp_path / 'earlier-1'}." in caplog.text
    # --resume goes on from the new one, and not from the old one.
    resumed = train(tmp_path, steps=steps + 1, learning_rate=1e-2, resume=True)
    assert [entry["learning_rate"] for entry in resumed.curves.steps] == [1e-2] * (steps + 1)
    train(tmp_path, steps=1)
    assert sorted(path.name for path in tmp_path.glob("earlier-*")) == ["earlier-1", "earlier-2"]


def test_a_new_training_that_dies_early_leaves_nothing_of_the_old_one_to_go_on_from(tmp_path):
    train(tmp_path)

    def stop(numbers):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(tiny_pipe(), SLA, samples(), tmp_path, replace(CONFIG, learning_rate=1e-2), on_step=stop)
    resumed = train(tmp_path, learning_rate=1e-2, resume=True)
    assert [entry["learning_rate"] for entry in resumed.curves.steps] == [1e-2] * 2


def test_a_training_that_cannot_begin_leaves_the_old_one_in_place(tmp_path):
    train(tmp_path)
    old = contents(tmp_path)
    for channels, features, error, message in (
        (5, 32, ValueError, r"flat is of another model: its latents are \[1, 5, 3, 12, 16\], .* takes 16 channels"),
        (16, 7, RuntimeError, None),
    ):
        condition = {"encoder_hidden_states": torch.zeros(1, 8, features)}
        unfit = [Sample("flat", torch.zeros(1, channels, 3, 12, 16), 1000.0, condition)]
        with pytest.raises(error, match=message):
            train(tmp_path, data=unfit)
    with pytest.raises(ValueError, match="no sample"):
        finetune(tiny_pipe(), SLA, [], tmp_path, CONFIG)
    assert contents(tmp_path) == old


def other_contents() -> list[Sample]:
    data = samples()
    data[3] = replace(data[3], latents=data[3].latents + 1.0)
    return data


def other_captions() -> list[Sample]:
    data = samples()
    data[3] = replace(data[3], condition={"encoder_hidden_states": torch.zeros(1, 8, 32)})
    return data


DIFFERENCES = {
    "density": (lambda: {"recipe": SLA.with_fields({"select.density": 0.5})}, r"select\.density = 0\.3, got 0\.5"),
    "order": (lambda: {"recipe": SLA.with_fields({"order": "raster"})}, r"order\.kind = 'tiles', got 'raster'"),
    "objective": (lambda: {"objective": OBJECTIVES["distill"]}, r"objective\.flow = 1\.0, got 0\.0"),
    "rate": (lambda: {"learning_rate": 0.1}, r"learning_rate = 0\.001, got 0\.1"),
    "seed": (lambda: {"seed": 5}, r"seed = 0, got 5"),
    "parameters": (lambda: {"train": "all"}, r"train = 'attention', got 'all'"),
    "lora": (lambda: {"lora_rank": 2}, r"lora_rank = 0, got 2"),
    "held out": (lambda: {"evaluate_samples": 2}, r"evaluate_samples = 1, got 2"),
    "batch": (lambda: {"batch_size": 2}, r"1 samples a step \(processes x batch_size x accumulation\), got 2"),
    "weights": (lambda: {"pipe": trained_a_little()}, r"other weights of the transformer"),
    "depth": (lambda: {"pipe": tiny_pipe(layers=3)}, r"transformer\.layers = 2, got 3"),
    "shift": (lambda: {"pipe": shifted()}, r"shift = 3\.0, got 5\.0"),
    "precision": (lambda: {"pipe": in_half(), "precision": "bf16"}, r"precision = 'no', got 'bf16'"),
    "fewer samples": (lambda: {"data": samples(4)}, r"on 6 samples, got 4"),
    "other samples": (lambda: {"data": samples()[::-1]}, r"on other samples than the 6 given"),
    "other contents": (lambda: {"data": other_contents()}, r"on other samples than the 6 given"),
    "other captions": (lambda: {"data": other_captions()}, r"on other samples than the 6 given"),
    "fewer steps": (lambda: {"steps": 1}, r"has 2 steps done, got steps = 1"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train(folder)
    return folder


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_only_the_same_training_goes_on(finished, difference):
    make, message = DIFFERENCES[difference]
    before = contents(finished)
    changes = {"steps": 3} | make()
    pipe = changes.pop("pipe", None) or tiny_pipe()
    values = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    with pytest.raises(ValueError, match=rf"step-0000002 .*{message}"):
        train(finished, pipe=pipe, resume=True, **changes)
    assert contents(finished) == before
    assert pipe.transformer.state_dict().keys() == values.keys()
    assert all(torch.equal(value, values[name]) for name, value in pipe.transformer.state_dict().items())


def test_what_changes_nothing_of_the_training_may_differ(tmp_path):
    train(tmp_path, accumulation=2)
    result = train(
        tmp_path,
        resume=True,
        steps=4,
        batch_size=2,
        gradient_checkpointing=True,
        adapter_dtype="int8",
        evaluate_every=1,
        checkpoint_every=4,
        keep_checkpoints=1,
        max_seconds=1000.0,
    )
    assert [entry["step"] for entry in result.curves.steps] == [1, 2, 3, 4]
    assert list(rates(tmp_path)) == ["step-0000004"]
    assert not list(tmp_path.glob("earlier-*"))
    straight = train(tmp_path / "straight", steps=4, accumulation=2)
    for joined, whole in zip(result.curves.steps, straight.curves.steps, strict=True):
        assert joined["loss"] == pytest.approx(whole["loss"], rel=1e-4)


def test_a_finished_training_that_goes_on_has_nothing_to_do(tmp_path):
    first = train(tmp_path)
    assert train(tmp_path, resume=True).curves.to_dict() == first.curves.to_dict()


def test_what_a_checkpoint_is_of_is_known_without_data(finished, tmp_path):
    """So that samples need not be made first."""
    pipe = tiny_pipe()
    refuse_unfit(pipe, SLA, finished, CONFIG, resume=True)
    with pytest.raises(ValueError, match=r"select\.density = 0\.3, got 0\.5"):
        refuse_unfit(pipe, SLA.with_fields({"select.density": 0.5}), finished, CONFIG, resume=True)
    with pytest.raises(ValueError, match="Unknown backend 'magic'"):
        refuse_unfit(pipe, SLA, tmp_path, CONFIG, backend="magic")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (PROGRESS, "{", "does not say which training it is of"),
        (PROGRESS, "[]", "does not say which training it is of"),
        (PROGRESS, '{"step": 2, "config": {}, "curves": {}}', r"does not say which training .*KeyError 'recipe'"),
        ("optimizer.bin", "no optimizer", "step-0000002 cannot be read: "),
        ("trained.safetensors", "no tensors", "step-0000002 cannot be read: "),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path, name, content, message):
    """The one without a recipe is as older versions wrote it."""
    train(tmp_path)
    (tmp_path / "checkpoints" / "step-0000002" / name).write_text(content)
    pipe = tiny_pipe()
    values = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    with pytest.raises(ValueError, match=message) as raised:
        train(tmp_path, pipe=pipe, steps=3, resume=True)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(value, values[name]) for name, value in pipe.transformer.state_dict().items())
    (tmp_path / "checkpoints" / "step-0000002" / PROGRESS).unlink()
    assert newest_checkpoint(tmp_path).name == "step-0000001"
    assert len(train(tmp_path, steps=3, resume=True).curves.steps) == 3


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("limit", [300, 3_000, 12_000, 30_000])
def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(tmp_path, limit):
    """Wherever it fills up: event files, tensors, the optimizer's state, progress or curves."""
    with files_up_to(limit), pytest.raises(ValueError, match="Cannot write") as raised:
        train(tmp_path, ema_decay=0.9)
    assert "\n" not in str(raised.value)
    assert newest_checkpoint(tmp_path) is None
    assert not list(tmp_path.glob("checkpoints/*"))
    for path in tmp_path.glob("*.json"):
        json.loads(path.read_text())
    # With room again the same command works.
    assert len(train(tmp_path).curves.steps) == 2


def test_a_checkpoint_left_half_written_is_cleared_away(tmp_path):
    """As a killed process leaves it."""
    for name in (".step-0000001", ".step-0000009"):
        half = tmp_path / "checkpoints" / name
        half.mkdir(parents=True)
        (half / "pytorch_model_fsdp_0").write_text("left over")
    train(tmp_path, resume=True)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-0000001", "step-0000002"]
