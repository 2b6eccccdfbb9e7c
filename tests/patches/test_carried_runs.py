"""Whole runs of ``carried``: what it adds belongs to its run, prompt, size and step, in every family."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import dit_accel
from dit_accel import presets
from tests import pipe_calls
from tests.pipe_calls import Call

CARRIED = presets.carried(block=(32, 32))
FAMILIES = tuple(pipe_calls.SIZES)


class Broken(Exception):
    """Breaks a run off."""


def breaks_after(step: int):
    def callback(_pipe, index, _timestep, _kept):
        if index == step:
            raise Broken
        return {}

    return callback


@pytest.mark.parametrize("strength", [None, 0.6])
@pytest.mark.parametrize("family", FAMILIES)
def test_where_nothing_is_left_out_nothing_is_added(family, strength):
    """At density 1 the differences are roundings, whatever the size, the guidance, and the step of the beginning."""
    if strength is not None and not pipe_calls.has_video(family, None):
        pytest.skip("no pipeline of this family begins at a later step")
    base = pipe_calls.build(family)
    pipe = base if strength is None else pipe_calls.another(base, pipe_calls.VIDEO[family])
    for call in (Call(10, 0, True, 0, strength), Call(9, 1, False, 1, strength)):
        dense = pipe_calls.perform(pipe, family, call)
        with dit_accel.patch(base, CARRIED.with_fields({"select.density": 1.0})) as handle:
            whole = pipe_calls.perform(pipe, family, call)
            assert handle.summary().dense_calls["search step"] > 0
            assert handle.summary().sparse_calls > 0
        # float32 keeps 2^-24 of a number, and a run multiplies what was off by less than 32.
        assert (whole - dense).norm() <= 2.0**-19 * dense.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_broken_runs_leave_nothing_to_the_next(family):
    """Of another size, number of steps, and guidance."""
    calls = [Call(10, 0), Call(7, 1, guided=False, seed=1), Call(10, 2, seed=2)]
    alone = []
    for call in calls:
        pipe = pipe_calls.build(family)
        with dit_accel.patch(pipe, CARRIED):
            alone.append(pipe_calls.perform(pipe, family, call))
    pipe = pipe_calls.build(family)
    with dit_accel.patch(pipe, CARRIED):
        for step in (0, 3):
            for number, call in enumerate(calls):
                with pytest.raises(Broken):
                    pipe_calls.perform(pipe, family, calls[number - 1], callback_on_step_end=breaks_after(step))
                assert torch.equal(pipe_calls.perform(pipe, family, call), alone[number])


@pytest.mark.parametrize("family", ["wan", "flux", "hunyuan"])
def test_a_nan_of_the_latents_is_counted_and_gone_with_its_run(family):
    pipe, call = pipe_calls.build(family), Call(10)

    def poison(_pipe, index, _timestep, kept):
        latents = kept["latents"].clone()
        if index == 5:
            latents[(0,) * latents.dim()] = float("nan")
        return {"latents": latents}

    with dit_accel.patch(pipe, CARRIED) as handle:
        plain = pipe_calls.perform(pipe, family, call)
        assert handle.summary().nan_calls == 0
        assert torch.isnan(pipe_calls.perform(pipe, family, call, callback_on_step_end=poison)).any()
        assert handle.summary().nan_calls > 0
        assert torch.equal(pipe_calls.perform(pipe, family, call), plain)


@pytest.mark.parametrize("family", ["wan", "flux"])
def test_compiled_blocks_and_an_adapter_loaded_later(family):
    """The same bits as eager blocks give, and as an adapter that was there before gives."""
    call = Call(10)
    before = pipe_calls.build(family, lora=True)
    plain = pipe_calls.perform(before, family, call)
    with dit_accel.patch(before, CARRIED):
        expected = pipe_calls.perform(before, family, call)
    pipe = pipe_calls.build(family)
    with dit_accel.patch(pipe, CARRIED):
        without = pipe_calls.perform(pipe, family, call)
        pipe_calls.add_lora(pipe)
        assert torch.equal(pipe_calls.perform(pipe, family, call), expected)
        pipe.transformer.disable_adapters()
        assert torch.equal(pipe_calls.perform(pipe, family, call), without)
        pipe.transformer.enable_adapters()
        pipe.transformer.compile_repeated_blocks(backend="eager")
        assert torch.equal(pipe_calls.perform(pipe, family, call), expected)
    assert torch.equal(pipe_calls.perform(pipe, family, call), plain)
    torch._dynamo.reset()


def test_samples_of_a_batch_carry_their_own():
    """In float64, where no rounding chooses other blocks: each sample as if it were alone."""
    pipe = pipe_calls.build("wan")
    pipe.transformer.double()
    noise = torch.randn(2, 16, 3, 12, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    text = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(1))
    given = SimpleNamespace(height=96, width=112, num_frames=9, num_inference_steps=10, output_type="latent")
    given.prompt_embeds, given.negative_prompt_embeds = text, -text

    def made(latents):
        with dit_accel.patch(pipe, CARRIED):
            return pipe(**vars(given), latents=latents, num_videos_per_prompt=len(latents)).frames

    together = made(noise)
    for sample in range(2):
        alone = made(noise[sample : sample + 1])
        assert (together[sample] - alone[0]).abs().max() <= 1e-12 * alone.abs().max()
