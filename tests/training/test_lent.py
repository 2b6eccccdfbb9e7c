"""A fine-tuning that is refused, fails or is interrupted leaves the pipeline as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import dit_accel
from dit_accel.patches.hooks import EnterModule, LeaveBlock
from dit_accel.patches.targets import handle_of
from dit_accel.training import loop
from dit_accel.training.config import FinetuneConfig
from dit_accel.training.finetune import TrainingStopped, finetune
from dit_accel.training.objective import OBJECTIVES
from tests.recipes import POOLED, WINDOW
from tests.tiny import TINY
from tests.training.samples import SLA, files_up_to, samples, tiny_pipe

# Everything that changes a model: a moving average, checkpointed blocks, a teacher, a density that descends.
BUSY = FinetuneConfig(
    steps=3,
    learning_rate=1e-2,
    evaluate_samples=1,
    evaluate_every=2,
    checkpoint_every=2,
    ema_decay=0.5,
    gradient_checkpointing=True,
    objective=OBJECTIVES["clear"],
    density_start=0.8,
    density_steps=2,
)
KINDS = {
    "weights": BUSY,
    "all": replace(BUSY, train="all"),
    "lora": replace(BUSY, lora_rank=2),
    "learned": replace(BUSY, train="learned"),
}


class Boom(Exception):
    pass


def mixed_pipe() -> Any:
    """Neither all trainable nor all frozen, neither all in training nor all in evaluation mode; it has generated."""
    pipe = tiny_pipe()
    pipe.transformer.eval()
    pipe.transformer.blocks[1].train()
    pipe.transformer.blocks[0].requires_grad_(False)
    pipe.scheduler.set_timesteps(3)
    return pipe


def state(pipe: Any) -> dict[str, Any]:
    """All that a fine-tuning could leave behind."""
    model = pipe.transformer
    try:
        patched: Any = handle_of(pipe)
    except ValueError:
        patched = None
    return {
        "values": {name: p.detach().clone() for name, p in model.named_parameters()},
        "memory": {name: p.data_ptr() for name, p in model.named_parameters()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "grads": [name for name, p in model.named_parameters() if p.grad is not None],
        "modes": {name: module.training for name, module in model.named_modules()},
        "kinds": {name: type(module) for name, module in model.named_modules()},
        "own": {name: {k for k in vars(module) if k[0] != "_"} for name, module in model.named_modules()},
        # A patch adds its own for repeated blocks at the first forward with gradients, and takes them away itself.
        "hooks": {
            name: [
                type(hook)
                for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
                if not isinstance(hook, (EnterModule, LeaveBlock))
            ]
            for name, module in model.named_modules()
        },
        "checkpointing": (model.gradient_checkpointing, vars(model).get("_gradient_checkpointing_func")),
        "adapters": list(getattr(model, "peft_config", {})),
        "scheduler": dict(vars(pipe.scheduler)),
        "patched": patched,
        "density": None if patched is None else [s.engine.planner.density for s in patched.sessions.values()],
    }


def assert_as_before(pipe: Any, before: dict[str, Any], *besides: str) -> None:
    """Besides the parts of the state that are named."""
    after = state(pipe)
    for name, value in before["values"].items():
        assert torch.equal(value, after["values"][name]), name
        assert value.dtype == after["values"][name].dtype, name
    for what in before.keys() - {"values", "scheduler", *besides}:
        assert after[what] == before[what], what
    assert after["scheduler"].keys() == before["scheduler"].keys()
    assert after["scheduler"]["num_inference_steps"] == before["scheduler"]["num_inference_steps"]


def interrupted(pipe, data, out, config):
    def stop(numbers):
        if numbers["step"] == 2:
            raise KeyboardInterrupt

    return finetune(pipe, SLA, data, out, config, on_step=stop)


def failing_measure(at: int):
    def attempt(pipe, data, out, config):
        def measure(step):
            if step == at:
                raise Boom
            return {}

        return finetune(pipe, SLA, data, out, config, measure=measure)

    return attempt


def not_finite(pipe, data, out, config):
    def poison(numbers):
        for sample in data:
            sample.latents[:] = float("nan")

    return finetune(pipe, SLA, data, out, config, on_step=poison)


def data_that_vanish(pipe, data, out, config):
    class Vanishing(list):
        reads = 0

        def __getitem__(self, index):
            Vanishing.reads += 1
            if Vanishing.reads > len(data) + 4:
                raise Boom
            return super().__getitem__(index)

    return finetune(pipe, SLA, Vanishing(data), out, config)


def full_disk(pipe, data, out, config):
    with files_up_to(3000):
        return finetune(pipe, SLA, data, out, config)


def bad_optimizer(pipe, data, out, config):
    return finetune(pipe, SLA, data, out, replace(config, weight_decay=-1.0))


FAILURES = {
    "interrupted": (interrupted, KeyboardInterrupt, None),
    "first measure": (failing_measure(0), Boom, None),
    "last measure": (failing_measure(3), Boom, None),
    "not finite": (not_finite, TrainingStopped, "is nan at step 2"),
    "data vanish": (data_that_vanish, Boom, None),
    "full disk": (full_disk, ValueError, "Cannot write"),
    "optimizer": (bad_optimizer, ValueError, "weight_decay"),
}


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        *((failure, kind) for failure in FAILURES for kind in ("weights", "lora")),
        ("interrupted", "all"),
        ("interrupted", "learned"),
    ],
)
def test_a_training_that_fails_leaves_the_pipeline_as_it_was(failure, kind, tmp_path):
    attempt, error, message = FAILURES[failure]
    pipe = mixed_pipe()
    before = state(pipe)
    with pytest.raises(error, match=message):
        attempt(pipe, samples(4), tmp_path, KINDS[kind])
    assert_as_before(pipe, before)
    # The next training is the one asked for.
    if failure == "interrupted":
        assert finetune(pipe, POOLED, samples(4), tmp_path, FinetuneConfig(steps=1)).handle.recipe == POOLED


@pytest.mark.parametrize(
    ("recipe", "config", "message"),
    [
        (WINDOW, FinetuneConfig(density_start=0.5, density_steps=1), "needs a recipe with a density"),
        (POOLED, FinetuneConfig(train="learned"), "no parameters of its own"),
        ("magic", FinetuneConfig(), "Unknown recipe 'magic'"),
        (SLA, FinetuneConfig(transformer="transformer_2"), "has no transformer_2"),
    ],
    ids=lambda value: getattr(value, "train", "") or "",
)
def test_what_is_refused_touches_neither_pipeline_nor_folder(recipe, config, message, tmp_path):
    pipe = mixed_pipe()
    before = state(pipe)
    with pytest.raises(ValueError, match=message):
        finetune(pipe, recipe, samples(2), tmp_path / "out", config)
    assert_as_before(pipe, before)
    assert not (tmp_path / "out").exists()


def test_no_samples_are_refused_before_anything_is_touched(tmp_path):
    pipe = mixed_pipe()
    before = state(pipe)
    with pytest.raises(ValueError, match="There is no sample to train on"):
        finetune(pipe, SLA, [], tmp_path / "out", FinetuneConfig(steps=1))
    assert_as_before(pipe, before)
    assert not (tmp_path / "out").exists()


def test_samples_that_cannot_make_a_batch_are_refused_before_anything_is_touched(tmp_path):
    pipe, data = mixed_pipe(), samples(4)
    data[2] = replace(data[2], condition={"encoder_hidden_states": torch.randn(1, 9, 32)})
    before = state(pipe)
    with pytest.raises(ValueError, match=r"one size, got encoder_hidden_states \[1, 8, 32\] in sample-0 and"):
        finetune(pipe, SLA, data, tmp_path / "out", FinetuneConfig(steps=1, batch_size=2))
    assert_as_before(pipe, before)
    # One by one they train, and a batch may be larger than the data.
    finetune(pipe, SLA, data, tmp_path / "out", FinetuneConfig(steps=1))
    finetune(tiny_pipe(), SLA, data[:2], tmp_path / "out", FinetuneConfig(steps=1, batch_size=5))


def test_a_folder_that_cannot_be_written_is_refused_before_the_pipeline_is_touched(tmp_path):
    (tmp_path / "out").write_text("in the way")
    pipe = mixed_pipe()
    before = state(pipe)
    with pytest.raises(ValueError, match="Cannot write in"):
        finetune(pipe, SLA, samples(2), tmp_path / "out", FinetuneConfig(steps=1))
    assert_as_before(pipe, before)


def test_an_adapter_that_cannot_be_saved(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop, "save_adapter", refuse)
    pipe = mixed_pipe()
    before = state(pipe)
    with pytest.raises(ValueError, match=r"Cannot write .*adapter: No space left on device"):
        finetune(pipe, SLA, samples(2), tmp_path, BUSY)
    assert_as_before(pipe, before)


@pytest.mark.parametrize("kind", ["weights", "lora"])
def test_a_pipeline_that_was_patched_before_stays_patched(kind, tmp_path):
    pipe = mixed_pipe()
    plain = state(pipe)
    handle = dit_accel.patch(pipe, SLA)
    with torch.no_grad():
        pipe.transformer.blocks[0].attn1.dit_accel.weight += 0.5
    before = state(pipe)
    with pytest.raises(KeyboardInterrupt):
        interrupted(pipe, samples(4), tmp_path, KINDS[kind])
    # A patch gets more hooks with its first gradients, and takes them along.
    assert_as_before(pipe, before, "hooks")
    with pytest.raises(ValueError, match=r"patched with select\.density = 0\.3, got 0\.5; call unpatch"):
        finetune(pipe, SLA.with_fields({"select.density": 0.5}), samples(4), tmp_path)
    assert_as_before(pipe, before, "hooks")
    assert finetune(pipe, SLA, samples(4), tmp_path, replace(KINDS[kind], steps=1)).handle is handle
    handle.remove()
    if kind == "lora":
        assert_as_before(pipe, plain)


@pytest.mark.parametrize("kind", ["weights", "lora"])
def test_half_precision_comes_back_to_the_bit(kind, tmp_path):
    pipe = mixed_pipe()
    pipe.transformer.to(torch.bfloat16)
    before = state(pipe)
    with pytest.raises(KeyboardInterrupt):
        interrupted(pipe, samples(4), tmp_path, replace(KINDS[kind], precision="bf16"))
    assert_as_before(pipe, before, "memory")


def test_checkpointing_that_the_user_chose_stays(tmp_path):
    pipe = mixed_pipe()

    def own(module, *args):
        return torch.utils.checkpoint.checkpoint(module.__call__, *args, use_reentrant=False)

    pipe.transformer.enable_gradient_checkpointing(own)
    before = state(pipe)
    with pytest.raises(KeyboardInterrupt):
        interrupted(pipe, samples(4), tmp_path, BUSY)
    assert_as_before(pipe, before)
    finetune(pipe, SLA, samples(4), tmp_path, replace(BUSY, steps=1))
    assert state(pipe)["checkpointing"] == before["checkpointing"]
    assert state(pipe)["modes"].items() >= before["modes"].items()


def test_both_experts_come_back(tmp_path):
    pipe = TINY["wan2.2"].build()
    pipe.scheduler.set_timesteps(2)
    kept = {name: value.clone() for name, value in pipe.transformer_2.state_dict().items()}
    before = state(pipe)
    with pytest.raises(KeyboardInterrupt):
        interrupted(pipe, samples(4), tmp_path, replace(BUSY, transformer="transformer_2"))
    assert_as_before(pipe, before)
    after = pipe.transformer_2.state_dict()
    assert after.keys() == kept.keys()
    assert all(torch.equal(value, after[name]) for name, value in kept.items())
