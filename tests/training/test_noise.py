"""Noisy latents and what models predict of them, against float64; models that do not match flows; many timesteps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import dit_accel
from dit_accel.training.batches import Batches
from dit_accel.training.config import FinetuneConfig
from dit_accel.training.data import CapturedCall, capture_call, encode_video, generate_samples, without_prompt
from dit_accel.training.finetune import finetune
from dit_accel.training.noise import NoiseProcess, noise_process
from dit_accel.training.noisy import mean_square, velocity
from dit_accel.training.objective import OBJECTIVES
from dit_accel.training.samples import LatentFolder, Sample, read_sample, save_sample, spread_over
from tests.recipes import SMALL_TILES
from tests.tiny import TINY
from tests.training.samples import samples, tiny_pipe

ALPHAS = torch.linspace(0.99, 0.0, 11)
PROCESSES = [NoiseProcess("flow"), *(NoiseProcess(kind, ALPHAS) for kind in ("epsilon", "v_prediction", "sample"))]
POOLED = dit_accel.Recipe(order=SMALL_TILES, select=dit_accel.stages.select.pooled.Pooled(density=0.5, block=(32, 32)))


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.prediction)
def test_equations(process):
    data, noise = (torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(n)).double() for n in (0, 1))
    level = torch.tensor([0.1, 0.5, 0.9])
    mixed, target = process.mix(data, noise, level), process.target(data, noise, level)
    for n, place in enumerate(level.tolist()):
        if process.is_flow:
            a, s = 1 - place, place
            wanted = noise[n] - data[n]
        else:
            alpha = float(ALPHAS[round(10 * place)])
            a, s = math.sqrt(alpha), math.sqrt(1 - alpha)
            wanted = {"epsilon": noise[n], "sample": data[n], "v_prediction": a * noise[n] - s * data[n]}[
                process.prediction
            ]
        torch.testing.assert_close(mixed[n], a * data[n] + s * noise[n], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(target[n], wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(process.clean(mixed, target, level), data, rtol=1e-4, atol=1e-5)
    steps = process.timestep(level, 1000.0).tolist()
    assert steps == pytest.approx([100, 500, 900] if process.is_flow else [1, 5, 9])


def test_timesteps_of_a_discrete_schedule_are_drawn_alike():
    generator = torch.Generator().manual_seed(0)
    process = NoiseProcess("epsilon", ALPHAS)
    drawn = [round(10 * process.draw(generator, 0.0, 1.0)) for _ in range(2200)]
    counts = [drawn.count(step) for step in range(11)]
    assert min(counts) > 150
    assert max(counts) < 250


def cogvideox(**config):
    pipe = TINY["cogvideox"].build()
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_cogvideox_trains(kind, tmp_path):
    pipe = cogvideox(prediction_type=kind)
    call = TINY["cogvideox"].call(torch.Generator().manual_seed(0))
    size = {k: call.pop(k) for k in ("height", "width", "num_frames")}
    generate_samples(pipe, [call] * 3, tmp_path / "s", settings={**size, "num_inference_steps": 2})
    data = LatentFolder(tmp_path / "s")
    process = noise_process(pipe, "transformer", None)
    assert process.prediction == kind
    config = FinetuneConfig(steps=12, learning_rate=3e-3, evaluate_samples=1, batch_size=2, train="all")
    options = {"process": process, "trajectory": None, "dtype": torch.float32, "device": torch.device("cpu")}
    batch, _ = Batches(data, config, **options, rank=0, processes=1).training(0, 0)
    assert batch.timestep.tolist() == [round(t) for t in (batch.level * 999).tolist()]
    assert velocity(pipe.transformer, batch).shape == batch.target.shape
    result = finetune(pipe, POOLED, data, tmp_path / "out", config)
    losses = [entry["flow"] for entry in result.curves.steps]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert result.handle.summary().sparse_calls > 0


def test_cogvideox_encodes_clips_frames_first():
    pipe = cogvideox()
    video = torch.rand(1, 3, 9, 32, 48) * 2 - 1
    raw = pipe.vae.encode(video).latent_dist.mode()
    wanted = raw.permute(0, 2, 1, 3, 4) * pipe.vae.config.scaling_factor
    torch.testing.assert_close(encode_video(pipe, video), wanted)


def test_few_steps_need_a_flow(tmp_path):
    data = [Sample("x", torch.zeros(1, 3, 4, 8, 8), 1.0, {}, unconditional={})]
    config = FinetuneConfig(objective=OBJECTIVES["consistency"])
    with pytest.raises(ValueError, match="flow matching for all noise levels, got epsilon"):
        finetune(cogvideox(), POOLED, data * 4, tmp_path, config)


# Timesteps of tokens.


def test_spread_over_tokens_frames_and_patches():
    tokens = spread_over(torch.tensor([[0.0, 1.0, 1.0]]), torch.Size([1, 3, 7]))
    assert tokens.tolist() == [[[0.0], [1.0], [1.0]]]
    frames = spread_over(torch.tensor([[0.0, 1.0]]), torch.Size([1, 5, 2, 4, 6]))
    assert frames.shape == (1, 1, 2, 1, 1)
    patches = spread_over(torch.arange(12.0)[None], torch.Size([1, 5, 2, 4, 6]))
    assert patches.shape == (1, 1, 2, 4, 6)
    for frame, row, column in ((0, 0, 0), (0, 3, 5), (1, 1, 2), (1, 2, 1)):
        assert patches[0, 0, frame, row, column] == frame * 6 + row // 2 * 3 + column // 2
    with pytest.raises(ValueError, match="5 timesteps a sample are of no tokens or frames"):
        spread_over(torch.ones(1, 5), torch.Size([1, 5, 2, 4, 6]))


def held_samples() -> list[Sample]:
    """The first of three frames is given, by a timestep 0 of its tokens."""
    noised = torch.ones(1, 3, 6 * 8)
    noised[:, 0] = 0.0
    return [replace(sample, noised=noised.flatten(1)) for sample in samples(4)]


def test_what_is_given_stays_clean_and_takes_no_loss():
    data, pipe = held_samples(), tiny_pipe()
    options = {"process": noise_process(pipe, "transformer", None), "trajectory": None, "dtype": torch.float32}
    batches = Batches(data, FinetuneConfig(), **options, device=torch.device("cpu"), rank=0, processes=1)
    batch, (name,) = batches.training(0, 0)
    sample = next(one for one in data if one.name == name)
    assert torch.equal(batch.latents[:, :, 0], sample.latents[:, :, 0])
    assert not torch.equal(batch.latents[:, :, 1:], sample.latents[:, :, 1:])
    assert batch.timestep.shape == (1, 144)
    assert not batch.timestep[:, :48].any()
    assert (batch.timestep[:, 48:] == 1000 * batch.level).all()
    got = velocity(pipe.transformer, batch)
    wanted = (got - batch.target)[:, :, 1:].square().mean()
    torch.testing.assert_close(mean_square(got, batch.target, batch.noised), wanted)


def test_models_with_a_timestep_for_each_token_train(tmp_path):
    result = finetune(tiny_pipe(), POOLED, held_samples(), tmp_path, FinetuneConfig(steps=2, evaluate_samples=1))
    assert all(math.isfinite(entry["loss"]) for entry in result.curves.steps)
    save_sample(held_samples()[0], tmp_path / "x.safetensors")
    assert torch.equal(read_sample(tmp_path / "x.safetensors").noised, held_samples()[0].noised)


def test_a_pipeline_that_gives_many_timesteps_is_captured(tmp_path):
    """Wan 2.2's 5B gives each token one."""
    pipe = tiny_pipe()
    pipe.register_to_config(expand_timesteps=True)
    call = TINY["wan"].call(torch.Generator().manual_seed(0))
    size = {k: call.pop(k) for k in ("height", "width", "num_frames")}
    captured = capture_call(pipe, {k: v for k, v in call.items() if k != "guidance_scale"} | size)
    assert captured.noised is not None
    assert captured.noised.shape[1] * 4 == captured.latents[0, 0].numel()
    assert (captured.noised == 1).all()


def test_what_the_pipeline_holds_clean_is_what_it_gave():
    latents, made = torch.randn(1, 4, 3, 4, 4), torch.randn(1, 4, 3, 4, 4)
    captured = CapturedCall(latents, 1000.0, torch.tensor([[0.0, 1.0, 1.0]]), {})
    sample = captured.sample("x", made)
    assert torch.equal(sample.latents[:, :, 0], latents[:, :, 0])
    assert torch.equal(sample.latents[:, :, 1:], made[:, :, 1:])


# Samples that a teacher with guidance can use.


def test_samples_keep_what_the_model_is_given_without_a_prompt(tmp_path):
    pipe = tiny_pipe()
    call = TINY["wan"].call(torch.Generator().manual_seed(0))
    size = {k: call.pop(k) for k in ("height", "width", "num_frames")}
    generate_samples(pipe, [call], tmp_path, settings={**size, "num_inference_steps": 1}, unconditional=True)
    (sample,) = list(LatentFolder(tmp_path))
    assert torch.equal(sample.condition["encoder_hidden_states"], call["prompt_embeds"])
    assert sample.unconditional.keys() == {"encoder_hidden_states"}
    assert torch.equal(sample.unconditional["encoder_hidden_states"], call["negative_prompt_embeds"])
    with pytest.raises(ValueError, match="unconditional"):
        generate_samples(pipe, [call], tmp_path, settings={**size, "num_inference_steps": 1})


def test_without_prompt():
    assert without_prompt({"prompt": "a cat", "height": 5}) == {"prompt": "", "height": 5}
    assert without_prompt({"prompt": "a cat", "negative_prompt": "blur"}) == {"prompt": "blur"}
    with pytest.raises(ValueError, match="negative_prompt_embeds"):
        without_prompt({"prompt_embeds": 1})
