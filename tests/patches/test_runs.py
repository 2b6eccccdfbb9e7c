"""A run is a run and a branch is a branch: what one keeps never serves another."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections import Counter

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanVideoToVideoPipeline

import dit_accel
from dit_accel import Recipe
from dit_accel.layout import LatentGrid, TokenLayout
from dit_accel.patches.families.ltx import LTX
from dit_accel.run import Run
from dit_accel.stages.schedule import Schedule
from dit_accel.stages.select.mass import Mass
from dit_accel.stages.select.pooled import Pooled
from tests.recipes import POOLED, SMALL_TILES, WINDOW
from tests.tiny import TINY

BLOCK = (32, 32)
SEARCHING = Recipe(
    SMALL_TILES,
    Mass(density=0.3, head_adaptive=False, block=BLOCK),
    schedule=Schedule(
        dense_fraction=0.2, refresh_at=(0.0,), refresh_every=40, dense_refresh=True, plan_in_dense_phase=True
    ),
)
KEEPING = Recipe(SMALL_TILES, Pooled(density=0.3, block=BLOCK), schedule=Schedule(refresh_every=40))
WAN = TINY["wan"]


def pipeline() -> WanPipeline:
    """Attention so peaked that another plan shows."""
    pipe = WAN.build()
    with torch.no_grad():
        for block in pipe.transformer.blocks:
            block.attn1.norm_q.weight.mul_(6.0)
    return pipe


def beside(pipe: WanPipeline, kind: type = WanPipeline) -> WanPipeline:
    """Another pipeline over the same transformer, with a scheduler of its own."""
    return kind(
        tokenizer=None,
        text_encoder=None,
        vae=pipe.vae,
        transformer=pipe.transformer,
        scheduler=copy.deepcopy(pipe.scheduler),
    )


def fresh(recipe: Recipe, steps: int, **changes: object) -> torch.Tensor:
    pipe = pipeline()
    with dit_accel.patch(pipe, recipe):
        return WAN.run(pipe, steps, **changes)


def forward(model: torch.nn.Module, seed: int = 0, height: int = 12, width: int = 14) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return model(
        hidden_states=torch.randn(1, 16, 3, height, width, generator=generator),
        timestep=torch.tensor([500.0]),
        encoder_hidden_states=torch.randn(1, 16, 32, generator=generator),
    ).sample


@pytest.mark.parametrize("recipe", [SEARCHING, KEEPING, WINDOW], ids=["searching", "keeping", "window"])
def test_no_earlier_run_shows_in_a_later_one(recipe):
    wanted = fresh(recipe, 6)
    pipe = pipeline()
    with dit_accel.patch(pipe, recipe):
        WAN.run(pipe, 2, height=112, width=96)

        def stop(*_: object) -> dict[str, object]:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            WAN.run(pipe, 6, callback_on_step_end=stop)
        assert torch.equal(WAN.run(pipe, 6), wanted), "after a preview and a broken run"
        with torch.no_grad():
            forward(pipe.transformer)
        assert torch.equal(WAN.run(pipe, 6), wanted), "after a bare call"
        other = beside(pipe)
        WAN.run(other, 4)
        assert torch.equal(WAN.run(pipe, 6), wanted), "after another pipeline"
        assert torch.equal(WAN.run(other, 6), wanted), "by another pipeline"


@pytest.mark.parametrize("recipe", [SEARCHING, KEEPING], ids=["searching", "keeping"])
def test_a_run_inside_a_run_disturbs_neither(recipe):
    wanted = fresh(recipe, 5), fresh(recipe, 3)
    pipe = pipeline()
    other, inner = beside(pipe), []

    def nested(_: object, step: int, *rest: object) -> dict[str, object]:
        if step == 2:
            inner.append(WAN.run(other, 3))
        return {}

    with dit_accel.patch(pipe, recipe):
        outer = WAN.run(pipe, 5, callback_on_step_end=nested)
    assert torch.equal(outer, wanted[0])
    assert torch.equal(inner[0], wanted[1])


def test_another_scheduler_is_another_run():
    pipe = pipeline()
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, use_flow_sigmas=True)
    with dit_accel.patch(pipe, SEARCHING):
        wanted = WAN.run(pipe, 5)
    pipe = pipeline()
    with dit_accel.patch(pipe, SEARCHING):
        WAN.run(pipe, 5)
        pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, use_flow_sigmas=True)
        assert torch.equal(WAN.run(pipe, 5), wanted)


@pytest.mark.parametrize("number", [2, 4])
def test_threads_with_schedulers_of_their_own(number):
    wanted = [fresh(SEARCHING, 3 + n) for n in range(number)]
    pipe = pipeline()
    pipes, found = [beside(pipe) for _ in range(number)], {}
    with dit_accel.patch(pipe, SEARCHING) as handle:
        threads = [
            threading.Thread(target=lambda n=n: found.update({n: WAN.run(pipes[n], 3 + n)})) for n in range(number)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        summary = handle.summary()
    assert all(torch.equal(found[n], wanted[n]) for n in range(number))
    calls = summary.sparse_calls + sum(summary.dense_calls.values())
    assert calls == 2 * 2 * sum(3 + n for n in range(number)), "every call of two layers and branches is counted"


def test_bare_calls_after_a_run_are_those_of_a_bare_model():
    pipe = pipeline()
    with dit_accel.patch(pipe, SEARCHING), torch.no_grad():
        wanted = forward(pipe.transformer, 1)
    with dit_accel.patch(pipe, SEARCHING) as handle:
        WAN.run(pipe, 5)
        before = Counter(handle.summary().dense_calls)
        with torch.no_grad():
            assert torch.equal(forward(pipe.transformer, 1), wanted)
        assert Counter(handle.summary().dense_calls) == before


def test_bare_calls_after_a_patch_are_none_of_a_run_that_broke_off_before_it():
    pipe, seen = pipeline(), []

    def stop(*_):
        raise KeyboardInterrupt

    with dit_accel.patch(pipe, SEARCHING), pytest.raises(KeyboardInterrupt):
        WAN.run(pipe, 4, callback_on_step_end=stop)
    handle = dit_accel.patch(pipe, SEARCHING)
    with handle.observe(lambda _, call: seen.append(call.step.index)), torch.no_grad():
        forward(pipe.transformer, 1)
    assert seen == [None, None]


def test_a_loop_by_hand_has_steps():
    pipe, seen = pipeline(), []
    with dit_accel.patch(pipe, SEARCHING) as handle, handle.observe(lambda _, call: seen.append(call.step)):
        pipe.scheduler.set_timesteps(4)
        latents = torch.randn(1, 16, 3, 12, 14)
        for timestep in pipe.scheduler.timesteps:
            with torch.no_grad():
                velocity = pipe.transformer(latents, timestep[None], torch.zeros(1, 16, 32), return_dict=False)[0]
            latents = pipe.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    assert [step.index for step in seen[::2]] == [0, 1, 2, 3]


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_video_to_video_begins_where_its_strength_says_and_tells_its_branches_apart(strength):
    text = pipeline()
    call = WAN.call(torch.Generator().manual_seed(0))
    frames = call.pop("num_frames")
    call |= {"num_inference_steps": 6, "output_type": "latent", "latents": torch.randn(1, 16, 3, 12, 14)}
    video, seen = beside(text, WanVideoToVideoPipeline), []
    with dit_accel.patch(video, SEARCHING) as handle, handle.observe(lambda _, c: seen.append(c.step)):
        found = video(video=None, strength=strength, **call).frames
    assert [step.index for step in seen[::4]] == list(range(round(6 * (1 - strength)), 6))
    assert {step.branch for step in seen} == {"#0", "#1"}
    if strength == 1.0:
        with dit_accel.patch(text, SEARCHING):
            assert torch.equal(found, text(num_frames=frames, **call).frames)


def test_a_plan_of_one_key_mask_serves_no_other():
    run, layout = Run(), TokenLayout((1, 4, 8), 0, 32)
    mask = torch.ones(1, 32, dtype=torch.bool)
    kept = run.kept(layout, mask, 0)
    assert run.kept(layout, mask.clone(), 1) is kept, "the same content"
    mask[:, 20:] = False
    assert run.kept(layout, mask, 2) is not kept, "changed in place"
    assert run.kept(layout, None, 2) is not kept
    assert run.kept(layout, torch.ones(1, 32, dtype=torch.bool), 3) is kept


def test_what_is_kept_is_bounded():
    pipe = pipeline()
    with dit_accel.patch(pipe, KEEPING) as handle:
        for width in range(2, 30, 2):
            with torch.no_grad():
                forward(pipe.transformer, 0, 4, width)
        planner = handle.sessions["transformer"].engine.planner
        runs = handle.sessions["transformer"]._thread.runs
        assert len(planner.tables._prepared.entries) <= 8
        assert len(runs._bare._kept.entries) <= 8


@pytest.mark.parametrize("recipe", ["dense", WINDOW, POOLED, KEEPING], ids=["dense", "window", "pooled", "keeping"])
@pytest.mark.parametrize("sizes", [((12, 14), (14, 12)), ((12, 14), (12, 14))], ids=["two grids", "one grid"])
def test_a_repeated_block_is_of_its_own_forward(recipe, sizes):
    def gradient(checkpointing: bool) -> torch.Tensor:
        model = pipeline().transformer.train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        with dit_accel.patch(model, recipe):
            losses = [forward(model, seed, *size).square().mean() for seed, size in enumerate(sizes)]
            sum(losses).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    plain, repeated = gradient(False), gradient(True)
    assert (plain - repeated).norm() <= 1e-5 * plain.norm()


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_pickle_of_a_patched_model_is_of_the_model(protocol):
    pipe = pipeline()
    with torch.no_grad():
        plain = forward(pipe.transformer)
    with dit_accel.patch(pipe, POOLED):
        copies = [pickle.loads(pickle.dumps(pipe.transformer, protocol)), copy.deepcopy(pipe.transformer)]
    for model in copies:
        with torch.no_grad():
            assert torch.equal(forward(model), plain)
        assert {type(m) for m in model.modules()} == {type(m) for m in pipe.transformer.modules()}


def test_coordinates_tell_ltx_its_grid_behind_condition_tokens():
    grid = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(4), torch.arange(5), indexing="ij")).flatten(1)
    condition = grid[:, 40:].clone()
    placed = torch.cat([condition, grid], 1)[None] * torch.tensor([0.04, 32.0, 32.0])[:, None]
    assert LTX.read_ids is not None
    assert LTX.read_ids(placed) == [LatentGrid((3, 4, 5), 20), LatentGrid((1, 4, 5), 0)]
    assert LTX.read_ids(placed[..., 20:]) == [LatentGrid((3, 4, 5), 0)]
    # A condition whose tokens are no raster is no grid, and read in full.
    scattered = torch.cat([placed[..., torch.randperm(20)], placed[..., 20:]], -1)
    assert LTX.read_ids(scattered) == [LatentGrid((3, 4, 5), 20)]
    with pytest.raises(ValueError, match=r"no raster|no grid"):
        LTX.read_ids(placed.flip(-1))


class ByHand:
    """An attention processor of another module."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states)), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        return attn.to_out[0](torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


def test_a_processor_that_attends_by_itself_is_counted():
    pipe = pipeline()
    with dit_accel.patch(pipe, POOLED) as handle:
        for block in pipe.transformer.blocks:
            block.attn1.set_processor(ByHand())
        WAN.run(pipe, 2)
        summary = handle.summary()
    assert summary.sparse_calls == 0
    assert sum(summary.dense_calls.values()) == 2 * 2 * 2


@pytest.mark.parametrize("compiled", [False, True])
def test_context_parallelism_is_counted(compiled, monkeypatch):
    gc.collect()  # another test's patched model would hold the symbol
    pipe = pipeline()
    module = __import__(type(pipe.transformer.blocks[0].attn1.processor).__module__, fromlist=["x"])
    original = module.dispatch_attention_fn

    def without(*args, parallel_config=None, **kwargs):
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "dispatch_attention_fn", without)
    for block in pipe.transformer.blocks:
        block.attn1.processor._parallel_config = object()
    with dit_accel.patch(pipe, POOLED) as handle:
        if compiled:
            pipe.transformer.compile_repeated_blocks(backend="eager")
        with torch.no_grad():
            forward(pipe.transformer)
            forward(pipe.transformer)
        assert dict(handle.summary().dense_calls) == {"context parallelism of an unknown kind": 4}
