"""The loop on tiny models: it learns, resumes to the bit, stops on NaN, and trains on two processes alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dit_accel
from dit_accel.stages.select.learned import Learned
from dit_accel.training.config import FinetuneConfig
from dit_accel.training.few_steps import FewStepConfig
from dit_accel.training.finetune import TrainingStopped, finetune
from dit_accel.training.loop import rate_factor
from dit_accel.training.objective import OBJECTIVES, Objective, annealed_density, objective_for
from tests.recipes import POOLED, SMALL_TILES
from tests.tiny import TINY
from tests.training.samples import SLA, samples, tiny_pipe
from tests.training.test_gradients import RECIPES

SEER = dit_accel.Recipe(order=SMALL_TILES, select=Learned(density=0.3, rank=12, block=(32, 32)))
WEIGHTS = [field.name for field in fields(Objective) if field.name != "full_stream"]
FAST = FinetuneConfig(steps=4, learning_rate=1e-3, evaluate_samples=1)


def interrupt_at(step: int):
    """A callback that stops a run as Ctrl-C would."""

    def on_step(numbers):
        if numbers["step"] == step:
            raise KeyboardInterrupt

    return on_step


def trained(pipe) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in pipe.transformer.named_parameters()}


def test_the_loss_falls_and_everything_is_written(tmp_path):
    pipe = tiny_pipe()
    config = replace(FAST, steps=25, learning_rate=5e-3, batch_size=2, train="all", evaluate_every=10)
    result = finetune(pipe, SLA, samples(), tmp_path, config)
    losses = [entry["loss"] for entry in result.curves.steps]
    assert len(losses) == 25
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert [entry["step"] for entry in result.curves.evaluations] == [0, 10, 20, 25]
    assert result.curves.evaluations[-1]["flow_loss"] < result.curves.evaluations[0]["flow_loss"]
    assert json.loads((tmp_path / "curves.json").read_text()) == result.curves.to_dict()
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert list(tmp_path.glob("**/events.out.tfevents*"))
    assert pipe.transformer.blocks[0].attn1.dit_accel.weight.abs().max() > 0


@pytest.mark.parametrize("name", RECIPES)
def test_every_trainable_recipe_learns_with_its_own_objective(name, tmp_path):
    objective = OBJECTIVES[objective_for(name)]
    config = replace(
        FAST, steps=16, learning_rate=5e-3, batch_size=2, train="all", objective=replace(objective, flow=1.0)
    )
    pipe = tiny_pipe()
    result = finetune(pipe, RECIPES[name], samples(), tmp_path, config)
    flow = [entry["flow"] for entry in result.curves.steps]
    assert sum(flow[-4:]) < 0.9 * sum(flow[:4])
    summary = result.handle.summary()
    assert not summary.dense_calls
    # The disc is cut token by token, from blocks that reach over this small grid.
    assert summary.density < 0.98 or name == "clear"


def test_distillation_brings_the_sparse_model_back_to_dense(tmp_path):
    """Velocity error against the frozen dense model falls, and the dense teacher did not move."""
    pipe = tiny_pipe()
    recipe = SLA.with_fields({"select.density": 0.1})
    # Sharpened attention, so that leaving blocks out is felt.
    for block in pipe.transformer.blocks:
        block.attn1.norm_q.weight.data *= 2
        block.attn1.to_out[0].weight.data *= 4
    config = replace(FAST, steps=40, learning_rate=2e-3, batch_size=4, train="all", objective=OBJECTIVES["distill"])
    result = finetune(pipe, recipe, samples(2), tmp_path, config)
    losses = [entry["loss"] for entry in result.curves.steps]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    first, last = result.curves.evaluations[0], result.curves.evaluations[-1]
    assert last["velocity_error"] < 0.9 * first["velocity_error"]
    assert last["dense_flow_loss"] == first["dense_flow_loss"]


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    # A gate's backbone has no gradient, and refuses it.
    [(name, again) for name in OBJECTIVES for again in (False, True) if not (again and name == "gate")],
)
def test_objectives_train_and_checkpointing_changes_nothing(name, checkpointing, tmp_path):
    objective = replace(OBJECTIVES[name], full_stream=1.0 if name == "ssa" else 0.0)
    pipe = tiny_pipe()
    # Gates are of a learned selection, and are trained alone.
    recipe, train = (SEER, "learned") if name == "gate" else (SLA, FAST.train)
    few = FewStepConfig(steps=2, teacher_steps=3, critic_updates=2)
    config = replace(
        FAST, steps=2, objective=objective, gradient_checkpointing=checkpointing, train=train, few_steps=few
    )
    result = finetune(pipe, recipe, samples(2), tmp_path / "a", config)
    assert not pipe.transformer.is_gradient_checkpointing
    for entry in result.curves.steps:
        terms = [n for n in WEIGHTS if getattr(objective, n)]
        total = sum(getattr(objective, n) * entry[n] for n in terms)
        assert entry["loss"] == pytest.approx(total, rel=1e-5)
        assert all(entry[n] > 0 for n in terms)
    if checkpointing:
        other = tiny_pipe()
        finetune(other, recipe, samples(2), tmp_path / "b", replace(config, gradient_checkpointing=False))
        for name, value in trained(pipe).items():
            assert torch.equal(value, dict(other.transformer.named_parameters())[name]), name


@pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
def test_8_bits_in_the_loop_train_as_the_models_own_numbers_do(precision, tmp_path):
    """The same steps to a few percent, and an adapter that runs in these numbers."""
    curves = []
    for number in ("model", precision):
        pipe = tiny_pipe()
        recipe = SLA.with_fields({"precision": number})
        result = finetune(pipe, recipe, samples(2), tmp_path / number, replace(FAST, steps=5, train="all"))
        curves.append([entry["loss"] for entry in result.curves.steps])
    assert curves[1] == pytest.approx(curves[0], rel=0.02)
    assert curves[1] != curves[0]
    with dit_accel.load_adapter(tiny_pipe(), result.adapter) as handle:
        assert handle.recipe == recipe


@pytest.mark.parametrize("kind", ["weights", "lora"])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(kind, tmp_path):
    config = replace(
        FAST,
        steps=5,
        ema_decay=0.9,
        accumulation=2,
        warmup_steps=1,
        decay="cosine",
        density_start=0.8,
        density_steps=4,
        objective=Objective(flow=1.0, velocity=1.0, align=1.0, full_stream=0.5),
        checkpoint_every=3,
        lora_rank=4 if kind == "lora" else 0,
    )
    whole = tiny_pipe()
    straight = finetune(whole, SLA, samples(), tmp_path / "whole", config)
    stopped = tiny_pipe()
    # Interrupted, not shorter: the descent of the learning rate ends where it would have.
    with pytest.raises(KeyboardInterrupt):
        finetune(stopped, SLA, samples(), tmp_path / "parts", config, on_step=interrupt_at(4))
    resumed = tiny_pipe()
    joined = finetune(resumed, SLA, samples(), tmp_path / "parts", config, resume=True)
    assert trained(whole).keys() == trained(resumed).keys()
    for name, value in trained(whole).items():
        assert torch.equal(value, trained(resumed)[name]), name
    strip = [{k: v for k, v in e.items() if k != "seconds"} for e in straight.curves.steps]
    assert strip == [{k: v for k, v in e.items() if k != "seconds"} for e in joined.curves.steps]
    assert [entry["density"] for entry in strip] == pytest.approx([0.8, 0.675, 0.55, 0.425, 0.3])
    ours, theirs = (load_file(r.adapter / "adapter.safetensors") for r in (straight, joined))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_resuming_refuses_other_settings(tmp_path):
    finetune(tiny_pipe(), SLA, samples(), tmp_path, replace(FAST, steps=1, checkpoint_every=1))
    with pytest.raises(ValueError, match=r"learning_rate = 0\.001, got 0\.1"):
        finetune(tiny_pipe(), SLA, samples(), tmp_path, replace(FAST, learning_rate=0.1), resume=True)


def test_a_nan_loss_stops_with_step_batch_and_last_good_checkpoint(tmp_path):
    data = samples(4)
    pipe = tiny_pipe()

    def poison(numbers):
        if numbers["step"] == 3:
            for sample in data:
                sample.latents[0, 0, 0, 0, 0] = float("nan")

    with pytest.raises(TrainingStopped, match=r"loss is nan at step 4 \(batch: sample-\d\); .*step-0000002"):
        finetune(pipe, SLA, data, tmp_path, replace(FAST, steps=6, checkpoint_every=2), on_step=poison)
    assert len(json.loads((tmp_path / "curves.json").read_text())["steps"]) == 3
    assert all(torch.isfinite(value).all() for value in trained(pipe).values())
    assert not (tmp_path / "adapter").exists()


def test_after_training_the_model_is_as_it_was_but_for_the_weights(tmp_path):
    pipe = tiny_pipe()
    before = trained(pipe)
    pipe.transformer.requires_grad_(False)
    pipe.transformer.eval()
    result = finetune(pipe, SLA, samples(), tmp_path, replace(FAST, lora_rank=2))
    assert not pipe.transformer.training
    result.handle.remove()
    assert trained(pipe).keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in trained(pipe).items())
    assert not any(p.requires_grad for p in pipe.transformer.parameters())
    assert (
        pipe.transformer(torch.zeros(1, 16, 1, 4, 4), torch.zeros(1), torch.zeros(1, 4, 32), return_dict=False)[0].dtype
        == torch.float32
    )


def test_only_the_learned_parameters_move_when_asked(tmp_path):
    pipe = tiny_pipe()
    before = trained(pipe)
    finetune(pipe, SLA, samples(), tmp_path, replace(FAST, train="learned"))
    moved = {name for name, value in trained(pipe).items() if not torch.equal(value, before.get(name, value + 1))}
    assert moved == {f"blocks.{i}.attn1.dit_accel.{n}" for i in range(2) for n in ("weight", "bias")}


def test_bf16_trains_float32_weights(tmp_path):
    pipe = tiny_pipe()
    result = finetune(pipe, SLA, samples(), tmp_path, replace(FAST, steps=2, precision="bf16"))
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in result.curves.steps)
    assert pipe.transformer.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "heads"}, "train must be one of learned"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"ema_decay": 1.0}, "ema_decay must lie in"),
        ({"adapter_dtype": "int8", "train": "learned"}, "'int8' is for differences of weights"),
        ({"decay": "linear"}, "decay must be one of none, cosine"),
        ({"lora_rank": 4, "train": "all"}, "LoRA is for train = 'attention'"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**changes)


def test_settings_that_do_not_fit_the_model(tmp_path):
    with pytest.raises(ValueError, match="no parameters of its own"):
        finetune(tiny_pipe(), POOLED, samples(), tmp_path, replace(FAST, train="learned"))
    pipe = tiny_pipe()
    pipe.transformer.to(torch.bfloat16)
    with pytest.raises(ValueError, match="precision 'no' trains float32 models"):
        finetune(pipe, SLA, samples(), tmp_path, FAST)
    with pytest.raises(ValueError, match="at least one term"):
        Objective(flow=0.0)


def test_annealed_density():
    assert [annealed_density(1.0, 0.2, step, 4) for step in (0, 2, 4, 9)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert annealed_density(1.0, 0.2, 0, 0) == pytest.approx(0.2)


def test_the_learning_rate_rises_and_descends_to_nothing():
    config = replace(FAST, steps=12, warmup_steps=4, decay="cosine")
    factors = [rate_factor(config, step) for step in range(12)]
    assert factors[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert factors[8] == pytest.approx(0.5)
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert 0 < factors[-1] < 0.05
    assert [rate_factor(replace(config, decay="none"), step) for step in (4, 11)] == [1.0, 1.0]


def test_the_clock_ends_the_descent_where_steps_would_not():
    config = replace(FAST, steps=1_000_000, decay="cosine", max_seconds=10.0)
    assert [rate_factor(config, 3, spent) for spent in (0.0, 0.5, 1.0, 1.2)] == pytest.approx([1.0, 0.5, 0.0, 0.0])


def run_on_two(module: str, *arguments: str) -> str:
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", module]
    done = subprocess.run([*command, *arguments], env=env, cwd=root, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def assert_same_training(single, folder: Path) -> None:
    """Two runs on the same samples and noise: the same losses, and weights up to the order of a sum."""
    curves = json.loads((folder / "curves.json").read_text())
    for ours, theirs in zip(single.curves.steps, curves["steps"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    evaluated = {entry["step"]: entry["flow_loss"] for entry in curves["evaluations"]}
    for entry in single.curves.evaluations:
        assert entry["flow_loss"] == pytest.approx(evaluated[entry["step"]], rel=1e-4)
    ours, theirs = (load_file(path / "adapter.safetensors") for path in (single.adapter, folder / "adapter"))
    assert ours.keys() == theirs.keys()
    # Adam's first steps are a sign of the gradient: compare the sum of changes, not single values.
    for name, value in ours.items():
        assert (value - theirs[name]).norm() <= 0.05 * value.norm() + 1e-7, name


def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    """DDP over gloo."""
    run_on_two("tests.training.two_processes", str(tmp_path / "two"))
    single = finetune(tiny_pipe(), SLA, samples(), tmp_path / "one", replace(FAST, steps=3, accumulation=2))
    assert_same_training(single, tmp_path / "two")


@pytest.mark.parametrize("kind", ["weights", "lora"])
def test_two_shards_equal_one_with_twice_the_batch(kind, tmp_path):
    """FSDP2 over gloo, also stopped and resumed: a process holds half of each weight, the adapter the whole of it."""
    # Every start of two processes takes seconds: one kind is resumed.
    for steps in ("2", "3") if kind == "weights" else ("3",):
        run_on_two("tests.training.two_shards", kind, str(tmp_path / "two"), steps)
    config = replace(FAST, steps=3, accumulation=2, lora_rank=4 if kind == "lora" else 0)
    single = finetune(tiny_pipe(), SLA, samples(), tmp_path / "one", config)
    assert_same_training(single, tmp_path / "two")
    dit_accel.load_adapter(tiny_pipe(), tmp_path / "two" / "adapter").remove()


def test_public_names():
    assert dit_accel.save_adapter.__module__ == "dit_accel.training.adapter"


def test_two_experts_each_train_on_their_sigmas_and_share_a_pipeline(tmp_path, monkeypatch):
    """Wan 2.2: one run an expert, one adapter each; loaded together they are the two trained experts."""
    seen: dict[str, list[float]] = {"transformer": [], "transformer_2": []}
    adapters, values = [], {}
    for name in seen:
        pipe = TINY["wan2.2"].build()
        model, other = (getattr(pipe, n) for n in (name, "transformer_2" if name == "transformer" else "transformer"))
        model.register_forward_pre_hook(
            lambda m, a, k, name=name: seen[name].append(float(k["timestep"].max()) / 1000), with_kwargs=True
        )
        before = {n: v.clone() for n, v in other.named_parameters()}
        config = replace(FAST, steps=6, transformer=name, objective=OBJECTIVES["distill"])
        result = finetune(pipe, SLA, samples(), tmp_path / name, config)
        values[name] = {n: v.detach().clone() for n, v in model.named_parameters()}
        assert all(torch.equal(v, dict(other.named_parameters())[n]) for n, v in before.items())
        adapters.append(result.adapter)
    assert all(sigma >= 0.5 for sigma in seen["transformer"])
    assert all(sigma <= 0.5 for sigma in seen["transformer_2"])
    assert min(map(len, seen.values())) > 6
    fresh = TINY["wan2.2"].build()
    handle = [dit_accel.load_adapter(fresh, folder) for folder in adapters][-1]
    for name, wanted in values.items():
        for n, value in getattr(fresh, name).named_parameters():
            torch.testing.assert_close(value.detach(), wanted[n], rtol=0, atol=1e-7, msg=f"{name} {n}")
    handle.remove()
    assert trained(fresh).keys() == trained(TINY["wan2.2"].build()).keys()
    with pytest.raises(ValueError, match="does not fit WanTransformer3DModel: it is for other weights"):
        dit_accel.load_adapter(TINY["wan"].build(), adapters[1])


def test_a_time_limit_ends_a_run_as_usual(tmp_path):
    result = finetune(tiny_pipe(), SLA, samples(), tmp_path, replace(FAST, steps=1000, max_seconds=1e-6))
    assert len(result.curves.steps) == 1
    assert [entry["step"] for entry in result.curves.evaluations] == [0, 1]
    assert json.loads((result.adapter / "adapter.json").read_text())["training"]["steps"] == 1


def test_what_the_caller_measures_joins_the_curves(tmp_path):
    """With averaged weights and the patch on; generating in between changes nothing of the training."""
    pipe = tiny_pipe()
    seen = []

    def measure(step):
        seen.append((step, pipe.transformer.training, pipe.transformer.blocks[0].attn1.to_q.weight.sum().item()))
        embeds = torch.zeros(1, 4, 32)
        pipe(
            prompt_embeds=embeds, height=32, width=32, num_frames=5, num_inference_steps=2, guidance_scale=1.0,
            output_type="latent", generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        return {"found": float(step)}

    config = replace(FAST, steps=3, evaluate_every=2, ema_decay=0.5)
    result = finetune(pipe, SLA, samples(), tmp_path / "a", config, measure=measure)
    assert [(step, training) for step, training, _ in seen] == [(0, False), (2, False), (3, False)]
    assert [entry["found"] for entry in result.curves.evaluations] == [0.0, 2.0, 3.0]
    assert seen[-1][2] == pipe.transformer.blocks[0].attn1.to_q.weight.sum().item()
    plain = finetune(tiny_pipe(), SLA, samples(), tmp_path / "b", config)
    assert [entry["loss"] for entry in plain.curves.steps] == [entry["loss"] for entry in result.curves.steps]


def test_evaluation_does_not_depend_on_its_batches(tmp_path):
    found = []
    for size in (1, 3):
        config = replace(FAST, steps=1, batch_size=size, evaluate_samples=2, learning_rate=1e-9)
        result = finetune(tiny_pipe(), SLA, samples(), tmp_path / str(size), config)
        found.append(result.curves.evaluations[0])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_delta_is_saved_in_the_precision_of_the_model(tmp_path):
    pipe = tiny_pipe()
    pipe.transformer.to(torch.bfloat16)
    result = finetune(pipe, SLA, samples(), tmp_path, replace(FAST, precision="bf16"))
    stored = load_file(result.adapter / "adapter.safetensors")
    assert {v.dtype for n, v in stored.items() if "/delta/" in n} == {torch.bfloat16}
    assert {v.dtype for n, v in stored.items() if "/learned/" in n} == {torch.float32}
