"""A LoRA, a calibration, and their likes beside a recipe that reuses steps, and beside a profile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig

import dit_accel
from dit_accel import calibrate, presets
from dit_accel.stages.order.simple import Tiles
from dit_accel.stages.reuse.listed import Listed
from dit_accel.stages.select.mass import Mass
from tests.patches.test_reuse import KINDS, build, every_kind
from tests.recipes import POOLED
from tests.tiny import TINY

PARO = presets.paro(density=0.4, precision="model", dense_fraction=0.2, block=(32, 32))
LISTED = Listed((0, 1, 2, 4, 6), 7, order=1)
# The profile with blocks of which a tiny model has some; of twelve steps it computes nine.
FAST = replace(presets.fast(), order=Tiles((2, 2, 4)), select=Mass(density=0.3, head_adaptive=False, block=(32, 32)))
STEPS, COMPUTED = 12, 9


@pytest.fixture
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _run(pipe: Any, **changes: Any) -> torch.Tensor:
    return TINY["wan"].run(pipe, steps=STEPS, **changes)


def _check(summary: Any) -> None:
    """Both of a profile acted."""
    assert (summary.computed_forwards, summary.skipped_forwards) == (2 * COMPUTED, 2 * (STEPS - COMPUTED))
    assert all(layer.sparse_calls > 0 for layer in summary.layers)
    assert summary.density < 0.9


def _add_lora(pipe: Any) -> None:
    torch.manual_seed(5)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))


@every_kind
def test_a_lora_acts_in_computed_and_in_skipped_steps(kind: str) -> None:
    tiny, recipe = TINY["wan"], replace(POOLED, reuse=KINDS[kind])
    before, after = build(), build()
    _add_lora(before)
    with dit_accel.patch(before, recipe):
        expected = tiny.run(before, steps=7)
    with dit_accel.patch(after, recipe) as handle:
        plain = tiny.run(after, steps=7)
        _add_lora(after)
        # What blocks gave before the adapter came serves no run behind it.
        assert torch.equal(tiny.run(after, steps=7), expected)
        assert not torch.equal(expected, plain)
        after.transformer.disable_adapters()
        assert torch.equal(tiny.run(after, steps=7), plain)
        assert handle.summary().skipped_forwards > 0


@pytest.mark.parametrize("reuse", [LISTED, KINDS["first_block"]], ids=["listed", "first_block"])
def test_plans_of_a_calibration_serve_the_computed_steps(reuse: Any, tmp_path: Any) -> None:
    tiny = TINY["wan"]
    pipe = build()
    prompt = {k: v for k, v in tiny.call(torch.Generator().manual_seed(0)).items() if k != "generator"}
    path = tmp_path / "plans"
    calibrate(pipe, [prompt], PARO, generate_kwargs={"num_inference_steps": 5}, out=path)
    recipe = replace(PARO, reuse=reuse)
    with dit_accel.patch(pipe, recipe, calibration=path) as handle:
        first = tiny.run(pipe, steps=7)
        summary = handle.summary()
        assert torch.equal(tiny.run(pipe, steps=7), first)
    assert summary.skipped_forwards > 0
    assert summary.sparse_calls > 0
    assert first.isfinite().all()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("first", ["patch", "compile"])
def test_a_profile_and_compiled_blocks(first: str) -> None:
    pipe = build()
    with dit_accel.patch(pipe, FAST):
        expected = _run(pipe)
    if first == "compile":
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    with dit_accel.patch(pipe, FAST) as handle:
        if first == "patch":
            pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
        torch.testing.assert_close(_run(pipe), expected, atol=1e-8, rtol=1e-8)
        _check(handle.summary())


@pytest.mark.parametrize("first", ["patch", "offload"])
def test_a_profile_and_offloaded_groups(first: str) -> None:
    pipe, cpu = build(), torch.device("cpu")
    with dit_accel.patch(pipe, FAST):
        expected = _run(pipe)

    def offload() -> None:
        apply_group_offloading(pipe.transformer, cpu, cpu, offload_type="block_level", num_blocks_per_group=1)

    if first == "offload":
        offload()
    with dit_accel.patch(pipe, FAST) as handle:
        if first == "patch":
            offload()
        assert torch.equal(_run(pipe), expected)
        _check(handle.summary())


def test_a_profile_and_a_lora() -> None:
    before, after = build(), build()
    _add_lora(before)
    with dit_accel.patch(before, FAST):
        expected = _run(before)
    with dit_accel.patch(after, FAST) as handle:
        plain = _run(after)
        _add_lora(after)
        assert torch.equal(_run(after), expected)
        assert not torch.equal(expected, plain)
        after.transformer.disable_adapters()
        handle.reset()
        assert torch.equal(_run(after), plain)
        _check(handle.summary())


def test_a_profile_and_a_calibration(tmp_path: Any) -> None:
    pipe, path = build(), tmp_path / "plans"
    prompt = {k: v for k, v in TINY["wan"].call(torch.Generator().manual_seed(0)).items() if k != "generator"}
    calibrate(pipe, [prompt], FAST, generate_kwargs={"num_inference_steps": 5}, out=path)
    with dit_accel.patch(pipe, FAST, calibration=path) as handle:
        first = _run(pipe)
        _check(handle.summary())
        assert first.isfinite().all()
        assert torch.equal(_run(pipe), first)


class _Enough(Exception):
    pass


@pytest.mark.parametrize("how", ["exception", "interrupt"])
@pytest.mark.parametrize("recipe", [FAST, *(replace(POOLED, reuse=kind) for kind in KINDS.values())])
def test_an_interrupted_run_leaves_nothing_to_the_next(recipe: Any, how: str) -> None:
    pipe, fresh = build(), build()

    def stop(running: Any, step: int, _: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            if how == "exception":
                raise _Enough
            running._interrupt = True
        return values

    with dit_accel.patch(pipe, recipe), dit_accel.patch(fresh, recipe):
        try:
            broken = _run(pipe, callback_on_step_end=stop)
        except _Enough:
            broken = None
        # It was broken off for good: what was skipped behind it is not taken for computed.
        assert broken is None or not torch.equal(broken, _run(fresh))
        other = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(9))
        for changes in ({}, {"prompt_embeds": other}):
            assert torch.equal(_run(pipe, **changes), _run(fresh, **changes))


@pytest.mark.parametrize("at", range(STEPS))
def test_a_profile_hides_no_nan(at: int) -> None:
    pipe = build()

    def spoil(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            values["latents"][0, 0, 0, 0, 0] = float("nan")
        return values

    with dit_accel.patch(pipe, FAST):
        assert _run(pipe, callback_on_step_end=spoil).isnan().any()
        assert _run(pipe).isfinite().all()


def test_a_profile_computes_a_step_with_another_prompt() -> None:
    """Step 5 of 12 is not listed; behind a change of the prompt it runs."""
    assert 5 not in FAST.reuse.of_run(STEPS)
    new, computed = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(7)), []
    pipe = build()
    pipe.transformer.blocks[-1].register_forward_hook(lambda *_: computed.append(pipe.scheduler.step_index or 0))

    def change(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            values["prompt_embeds"] = new.to(values["prompt_embeds"])
        return values

    with dit_accel.patch(pipe, FAST):
        _run(pipe, callback_on_step_end=change, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert sorted(set(computed)) == sorted({5, *FAST.reuse.of_run(STEPS)})
