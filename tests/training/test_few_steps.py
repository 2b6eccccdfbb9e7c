"""Distilled to few steps under sparse attention: equations in float64, models that learn it, steps in the adapter."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from torch import nn

import dit_accel
from dit_accel.training.config import FinetuneConfig
from dit_accel.training.consistency import consistency_loss
from dit_accel.training.distribution_matching import Critic, distribution_loss, generated, matching_loss
from dit_accel.training.few_steps import FewStepConfig, FewSteps, Trajectory, denoise
from dit_accel.training.finetune import finetune
from dit_accel.training.noisy import NoisyBatch, guided, velocity
from dit_accel.training.objective import OBJECTIVES, Objective
from dit_accel.training.published.scheduler import few_step_scheduler
from tests.training.samples import SLA, samples, tiny_pipe

FEW = FewStepConfig(steps=4, teacher_steps=12, critic_updates=2)
FAST = FinetuneConfig(steps=3, learning_rate=1e-3, evaluate_samples=1, train="all", few_steps=FEW)


def with_unconditional(count: int = 4):
    empty = {"encoder_hidden_states": torch.zeros(1, 8, 32)}
    return [replace(sample, unconditional=empty) for sample in samples(count)]


# The levels.


def test_a_trajectory_is_cut_into_segments():
    trajectory = Trajectory.of(FewStepConfig(steps=4, teacher_steps=30), shift=3.0)
    assert trajectory.edges == (0, 8, 15, 22, 30)
    for n in (0, 1, 15, 29, 30):
        plain = 1 - n / 30
        assert trajectory.levels[n] == pytest.approx(3 * plain / (1 + 2 * plain))
    assert trajectory.steps(renoise=True) == FewSteps(tuple(trajectory.levels[n] for n in (0, 8, 15, 22)), True)
    for n in range(30):
        end = next(edge for edge in (8, 15, 22, 30) if edge > n)
        assert trajectory.after(trajectory.levels[n] + 1e-8) == (trajectory.levels[n + 1], trajectory.levels[end])
    generator = torch.Generator().manual_seed(0)
    assert {trajectory.draw(generator) for _ in range(500)} == set(trajectory.levels[:-1])


@pytest.mark.parametrize("renoise", [False, True])
def test_a_run_is_that_of_the_scheduler(renoise):
    steps = FewSteps((1.0, 0.8, 0.5, 0.2), renoise)
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    fresh = [torch.randn(2, 3, generator=torch.Generator().manual_seed(n)) for n in (1, 2, 3)]
    told = lambda x, level: torch.sin(3 * x) * level  # noqa: E731
    left = iter(fresh)
    got = denoise(told, noise, steps.sigmas, (lambda: next(left)) if renoise else None)
    scheduler, latents = few_step_scheduler(steps), noise
    scheduler.set_timesteps(4)
    for n, t in enumerate(scheduler.timesteps):
        generator = torch.Generator().manual_seed(n + 1)
        latents = scheduler.step(told(latents, t / 1000), t, latents, generator=generator, return_dict=False)[0]
    torch.testing.assert_close(got, latents, rtol=1e-5, atol=1e-5)


def test_new_noise_is_that_of_the_run_alone_or_in_a_batch():
    scheduler = few_step_scheduler(FewSteps((1.0, 0.8, 0.5), renoise=True))
    noise = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(0))

    def run(latents):
        scheduler.set_timesteps(3)
        for t in scheduler.timesteps:
            torch.randn(5)  # what others draw does not matter
            latents = scheduler.step(torch.sin(latents), t, latents, return_dict=False)[0]
        return latents

    together = run(noise)
    assert torch.equal(run(noise), together)
    assert torch.equal(run(noise[1:2]), together[1:2])
    # Of another noise, and in every step another: no sample has the noise of the next.
    scheduler.set_timesteps(3)
    zero = torch.zeros_like(noise)
    first, second = (
        scheduler.step(
            (noise if n == 0 else zero), scheduler.timesteps[n], noise if n == 0 else zero, return_dict=False
        )[0]
        for n in range(2)
    )
    added = [first / 0.8, second / 0.5]
    for one in added:
        assert 0.8 < float(one.std()) < 1.2
    flat = torch.cat([one.flatten(1) for one in added])
    assert float((torch.corrcoef(flat) - torch.eye(6)).abs().max()) < 0.3


def test_seeds_differ_in_their_new_noise_where_all_begin_with_one_given_picture():
    scheduler = few_step_scheduler(FewSteps((1.0, 0.8), renoise=True))
    latents = torch.randn(2, 4096, generator=torch.Generator().manual_seed(0))
    latents[:, :2048] = 0.5
    scheduler.set_timesteps(2)
    one, other = scheduler.step(latents, scheduler.timesteps[0], latents, return_dict=False)[0] / 0.8
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.3


# The equations, on a model whose velocity is written out.


class Line(nn.Module):
    """``v = w x + b level + c condition``; sparse, half of that and one more."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = nn.Parameter(torch.tensor([0.3, -0.2, 0.7], dtype=torch.float64))
        self.dense = False

    def forward(self, hidden_states, timestep, return_dict, condition):
        w, b, c = self.numbers
        wide = timestep.view(-1, 1, 1)
        full = w * hidden_states + b * wide + c * condition
        return (full if self.dense else 0.5 * full + 1,)

    @contextmanager
    def disabled(self):
        before, self.dense = self.dense, True
        try:
            yield
        finally:
            self.dense = before


def line_batch(level: torch.Tensor) -> NoisyBatch:
    generator = torch.Generator().manual_seed(3)
    shape = (len(level), 2, 3)
    latents, condition, without = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return NoisyBatch(
        latents=latents,
        target=latents,
        timestep=level,
        condition={"condition": condition},
        level=level,
        timesteps=lambda level: level,
        unconditional={"condition": without},
        generators=[torch.Generator().manual_seed(10 + n) for n in range(len(level))],
    )


def test_consistency_against_its_equation():
    """By hand, with f of the paper, and its gradient, which does not reach the right side."""
    trajectory = Trajectory.of(FewStepConfig(steps=2, teacher_steps=4), shift=1.0)
    level = torch.tensor([1.0, 0.75, 0.25], dtype=torch.float64)
    batch, model, scale = line_batch(level), Line(), 2.5
    # Predictions come in float32: the numbers are compared to that.
    found = consistency_loss(model, model.disabled(), batch, trajectory, scale)
    found.backward()
    w, b, c = (float(number) for number in model.numbers.detach())
    numbers = torch.tensor([w, b, c], dtype=torch.float64, requires_grad=True)
    total = 0.0
    for n, (t, u, s) in enumerate(((1.0, 0.75, 0.5), (0.75, 0.5, 0.5), (0.25, 0.0, 0.0))):
        x, told, without = batch.latents[n], batch.condition["condition"][n], batch.unconditional["condition"][n]
        of = lambda x, t, p: w * x + b * t + c * p  # noqa: E731
        teacher = of(x, t, without) + scale * (of(x, t, told) - of(x, t, without))
        there = x + (u - t) * teacher
        target = there + (s - u) * (0.5 * of(there, u, told) + 1)
        ours = x + (s - t) * (0.5 * (numbers[0] * x + numbers[1] * t + numbers[2] * told) + 1)
        total = total + ((ours - target) / (t - s)).square().mean() / 3
    torch.testing.assert_close(found.double(), total.detach(), rtol=1e-5, atol=1e-6)
    (wanted,) = torch.autograd.grad(total, numbers)
    torch.testing.assert_close(model.numbers.grad, wanted, rtol=1e-5, atol=1e-6)


def test_matching_against_its_equation():
    made, real, fake = (torch.randn(3, 4, dtype=torch.float64) for _ in range(3))
    made.requires_grad_(True)
    matching_loss(made, real, fake).backward()
    for n in range(3):
        size = (made[n] - real[n]).abs().mean()
        torch.testing.assert_close(made.grad[n], ((fake[n] - real[n]) / size / 12).detach())


def test_only_the_last_step_of_a_simulated_run_has_a_gradient():
    trajectory, model = Trajectory.of(FewStepConfig(steps=2, teacher_steps=4), shift=1.0), Line()
    made = generated(model, line_batch(torch.ones(2, dtype=torch.float64)), trajectory, 1)
    batch = line_batch(torch.ones(2, dtype=torch.float64))
    first, second = batch.noise().double(), batch.noise().double()
    numbers = model.numbers.detach().clone().requires_grad_(True)
    told = lambda x, t, p: 0.5 * (p[0] * x + p[1] * t + p[2] * batch.condition["condition"]) + 1  # noqa: E731
    clean = first - told(first, 1.0, numbers.detach())
    later = 0.5 * clean + 0.5 * second
    wanted = later - 0.5 * told(later, 0.5, numbers)
    torch.testing.assert_close(made.double(), wanted, rtol=1e-5, atol=1e-5)
    made.double().square().sum().backward()
    (gradient,) = torch.autograd.grad(wanted.square().sum(), numbers)
    torch.testing.assert_close(model.numbers.grad, gradient, rtol=1e-4, atol=1e-4)


# A model that learns it: of a normal distribution the velocity is known.


class Normal(nn.Module):
    """The velocity field of a normal distribution, ``mean`` and ``log_spread`` its parameters; sparse, it is off."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_spread = nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor(0.4).log())
        # Named as parameters of a recipe are.
        self.dit_accel = nn.ParameterDict({"off": nn.Parameter(torch.tensor(0.8))})
        self.dense = False

    def forward(self, hidden_states, timestep, return_dict):
        level = timestep.view(-1, 1)
        spread = self.log_spread.exp()
        variance = ((1 - level) * spread).square() + level.square()
        clean = self.mean + (1 - level) * spread.square() / variance * (hidden_states - (1 - level) * self.mean)
        return ((hidden_states - clean) / level.clamp_min(1e-4) + (0.0 if self.dense else self.dit_accel["off"]),)

    @contextmanager
    def disabled(self):
        before, self.dense = self.dense, True
        try:
            yield
        finally:
            self.dense = before


class Parts:
    """What a critic needs of the trained parameters."""

    def __init__(self, model: Normal) -> None:
        self.model, self.handle = model, model

    def named(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())


def normal_batch(seed: int, count: int = 256) -> NoisyBatch:
    level = torch.ones(count)
    return NoisyBatch(
        torch.zeros(count, 2), torch.zeros(count, 2), level, {}, level, lambda level: level,
        generators=[torch.Generator().manual_seed(seed * 1000 + n) for n in range(count)],
    )  # fmt: skip


def test_distribution_matching_takes_a_sparse_model_back_to_the_distribution():
    trajectory = Trajectory.of(FewStepConfig(steps=4, teacher_steps=30), shift=2.0)
    model = Normal()
    first = {name: value.detach().clone() for name, value in model.named_parameters()}
    critic = Critic(Parts(model), FinetuneConfig(learning_rate=0.05, weight_decay=0.0), lambda value: value)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    @contextmanager
    def teacher():
        now = {name: value.data for name, value in model.named_parameters()}
        with model.disabled():
            for name, value in model.named_parameters():
                value.data = first[name]
            yield
            for name, value in model.named_parameters():
                value.data = now[name]

    def away() -> tuple[float, float]:
        with torch.no_grad():
            made = generated(model, normal_batch(999), trajectory, 3)
        return float((made.mean(0) - first["mean"]).norm()), abs(float(made.std(0).mean()) - 0.4)

    before = away()
    for step in range(120):
        for update in range(4):
            batch = normal_batch(5 * step + update + 1, 64)
            with torch.no_grad():
                made = generated(model, batch, trajectory, step % 4)
            critic.update(batch, made, 2.0)
        loss = distribution_loss(
            model, teacher(), critic.present(), normal_batch(5 * step + 5, 64), trajectory, step % 4, 1.0, 2.0
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = away()
    assert before[0] > 0.1
    assert after[0] < 0.3 * before[0]
    assert after[1] < 0.85 * before[1]
    assert critic.values.keys() == {"mean", "log_spread"}


def teach(model, data, steps: int) -> None:
    """Flow matching with dropped prompts, so that guidance matters."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    clean = torch.cat([sample.latents for sample in data])
    prompts = torch.cat([sample.condition["encoder_hidden_states"] for sample in data])
    for step in range(steps):
        noise, level = torch.randn(clean.shape, generator=generator), torch.rand(len(clean), generator=generator)
        wide = level.view(-1, 1, 1, 1, 1)
        told = model(
            hidden_states=(1 - wide) * clean + wide * noise,
            timestep=level * 1000,
            encoder_hidden_states=prompts * (step % 5 > 0),
            return_dict=False,
        )[0]
        loss = (told - noise + clean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_consistency_brings_four_steps_nearer_to_the_teachers_run(tmp_path):
    """A tiny model under sparse attention: the loss falls, and so does the distance of clips from the same noise."""
    pipe, data = tiny_pipe(), with_unconditional(2)
    teach(pipe.transformer, data, 60)
    config = replace(
        FAST,
        steps=32,
        learning_rate=2e-3,
        batch_size=2,
        evaluate_samples=2,
        objective=OBJECTIVES["consistency"],
        few_steps=FewStepConfig(steps=4, teacher_steps=30, guidance=2.0),
    )
    result = finetune(pipe, SLA, data, tmp_path, config)
    losses = [entry["consistency"] for entry in result.curves.steps]
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])
    first, last = result.curves.evaluations[0], result.curves.evaluations[-1]
    assert last["few_step_distance"] < 0.7 * first["few_step_distance"]
    assert not result.handle.summary().dense_calls


# In the loop, in the adapter, in a pipeline.


@pytest.mark.parametrize("name", ["consistency", "dmd"])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(name, tmp_path):
    config = replace(FAST, steps=3, objective=OBJECTIVES[name], checkpoint_every=2)
    config = replace(config, few_steps=replace(FEW, guidance=2.0, teacher_steps=4), lora_rank=0)

    def interrupt(numbers):
        if numbers["step"] == 3:
            raise KeyboardInterrupt

    whole = finetune(tiny_pipe(), SLA, with_unconditional(), tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny_pipe(), SLA, with_unconditional(), tmp_path / "parts", config, on_step=interrupt)
    joined = finetune(tiny_pipe(), SLA, with_unconditional(), tmp_path / "parts", config, resume=True)
    ours, theirs = (load_file(r.adapter / "adapter.safetensors") for r in (whole, joined))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    strip = [[{k: v for k, v in e.items() if k != "seconds"} for e in r.curves.steps] for r in (whole, joined)]
    assert strip[0] == strip[1]


def test_the_adapter_brings_its_steps(tmp_path):
    pipe = tiny_pipe()
    scheduler = pipe.scheduler
    result = finetune(pipe, SLA, samples(4), tmp_path, replace(FAST, steps=1, objective=OBJECTIVES["dmd"]))
    levels = Trajectory.of(FEW, shift=3.0).steps(renoise=True).sigmas
    assert pipe.scheduler.config.few_step_sigmas == levels
    result.handle.remove()
    assert pipe.scheduler is scheduler
    fresh = tiny_pipe()
    with dit_accel.load_adapter(fresh, result.adapter) as handle:
        assert fresh.scheduler.config.few_step_sigmas == levels
        assert fresh.scheduler.config.stochastic_sampling
        assert "4 steps at the noise levels" in " ".join(str(handle.summary()).split())
        fresh.scheduler.set_timesteps(4)
        with pytest.raises(ValueError, match="distilled to 4 steps"):
            fresh.scheduler.set_timesteps(30)
    assert isinstance(fresh.scheduler, FlowMatchEulerDiscreteScheduler)
    assert "few_step_sigmas" not in fresh.scheduler.config
    card = json.loads((result.adapter / "adapter.json").read_text())
    (result.adapter / "adapter.json").write_text(json.dumps(card | {"steps": {"sigmas": [0.5, 0.8], "renoise": True}}))
    with pytest.raises(ValueError, match="is damaged: steps need falling sigmas"):
        dit_accel.load_adapter(tiny_pipe(), result.adapter)


def test_the_critic_leaves_no_trace():
    """Whatever it learns, the model outside has its own weights and no gradients."""
    pipe = tiny_pipe()
    with dit_accel.patch(pipe, SLA) as handle:
        from dit_accel.training.trainables import Trainables

        attentions = {f"blocks.{n}.attn1": block.attn1 for n, block in enumerate(pipe.transformer.blocks)}
        trainables = Trainables(pipe.transformer, handle, attentions, FAST)
        before = {name: value.detach().clone() for name, value in trainables.named().items()}
        critic = Critic(trainables, replace(FAST, learning_rate=0.1), lambda value: value)
        assert critic.values.keys() == {name for name in before if "dit_accel" not in name}
        sample = samples(1)[0]
        level = torch.ones(1)
        batch = NoisyBatch(
            sample.latents, sample.latents, level * 1000, sample.condition, level, lambda x: x * 1000,
            generators=[torch.Generator().manual_seed(0)],
        )  # fmt: skip
        losses = [float(critic.update(batch, sample.latents, 1.0)) for _ in range(3)]
        assert all(map(math.isfinite, losses))
        own = trainables.named()
        assert all(torch.equal(own[name], value) for name, value in before.items())
        assert all(parameter.grad is None for parameter in own.values())
        assert any(not torch.equal(critic.values[name], before[name]) for name in critic.values)
        trainables.take_back()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FewStepConfig(steps=0), "few_steps.steps must be at least 1, got 0"),
        (lambda: FewStepConfig(steps=8, teacher_steps=4), "at least the 8 steps"),
        (lambda: FewStepConfig(guidance=0.5), "guidance must be at least 1, got 0.5"),
        (lambda: FewStepConfig(critic_rate=0.0), "critic_rate must be above 0"),
        (lambda: Objective(dmd=1.0), "objective.dmd goes alone"),
        (lambda: FinetuneConfig(objective=OBJECTIVES["dmd"], train="learned"), "trains a critic"),
        (lambda: FinetuneConfig(objective=OBJECTIVES["dmd"], teacher="current"), "needs teacher = 'frozen'"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_guidance_needs_samples_that_know_no_prompt(tmp_path):
    config = replace(FAST, objective=OBJECTIVES["consistency"], few_steps=replace(FEW, guidance=2.0))
    with pytest.raises(ValueError, match="sample-0 has none; make them anew, or take guidance 1"):
        finetune(tiny_pipe(), SLA, samples(), tmp_path, config)
    batch = replace(line_batch(torch.ones(1, dtype=torch.float64)), unconditional=None)
    assert torch.equal(guided(Line(), batch, 1.0), velocity(Line(), batch))
    with nullcontext(), pytest.raises(ValueError, match="without a prompt"):
        guided(Line(), batch, 2.0)
