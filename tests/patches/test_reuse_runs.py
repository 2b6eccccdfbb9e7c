"""Reuse beside plans, failures, changed prompts, other caches, compilation and offloading."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import apply_group_offloading

import dit_accel
from dit_accel import Recipe
from dit_accel.presets.profiles import BALANCED_STEPS, FAST_STEPS, MAX_STEPS
from dit_accel.stages.reuse.first_block import FirstBlock
from dit_accel.stages.reuse.listed import Listed
from dit_accel.stages.reuse.magnitude import Magnitude
from dit_accel.stages.schedule import Schedule
from tests.patches.test_reuse import KINDS, build, every_kind
from tests.peaked import RECIPES
from tests.recipes import POOLED
from tests.tiny import TINY


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def _computed_steps(pipe: Any, recipe: Recipe, steps: int, **changes: Any) -> list[int]:
    """The steps at which the last block of a patched pipeline ran."""
    found: list[int] = []
    last = pipe.transformer.blocks[-1]
    hook = last.register_forward_hook(lambda *_: found.append(pipe.scheduler.step_index or 0))
    with dit_accel.patch(pipe, recipe):
        TINY["wan"].run(pipe, steps=steps, **changes)
    hook.remove()
    return sorted(set(found))


@every_kind
def test_a_search_is_in_a_computed_step(kind: str) -> None:
    """Step 2 of 10 is the last dense one, which searches; a list without it computes it all the same."""
    stage = Listed((0,), 10) if kind == "listed" else KINDS[kind]
    recipe = replace(RECIPES["mass"], reuse=stage)
    pipe = build()
    assert 2 in _computed_steps(pipe, recipe, 10)
    with dit_accel.patch(pipe, recipe) as handle:
        TINY["wan"].run(pipe, steps=10)
        summary = handle.summary()
    # One search for each layer and branch, all in the same step.
    assert summary.dense_calls["search step"] == 2 * 3
    assert all(layer.plans_made == 2 for layer in summary.layers)


def test_plans_age_by_computed_steps() -> None:
    """Every second step is listed; a plan serves three computed steps, and a new one is made in a computed step."""
    recipe = replace(POOLED, schedule=Schedule(refresh_every=3), reuse=Listed((0, 2, 4, 6, 8, 10), 12))
    computed, made, count, last = [], [], 0, -3
    for step in range(12):
        due = count - last >= 3
        if step % 2 == 0 or due:
            computed.append(step)
            if due:
                made.append(step)
                last = count
            count += 1
    pipe = build()
    assert _computed_steps(pipe, recipe, 12) == computed
    with dit_accel.patch(pipe, recipe) as handle:
        TINY["wan"].run(pipe, steps=12)
        assert {layer.plans_made for layer in handle.summary().layers} == {2 * len(made)}


@pytest.mark.parametrize(("steps", "expected"), [(6, [0, 2, 5]), (12, [0, 3, 7, 11]), (3, [0, 2]), (1, [0])])
def test_a_list_serves_runs_of_other_lengths(steps: int, expected: list[int]) -> None:
    assert _computed_steps(build(), Recipe(reuse=Listed((0, 2, 5), 6)), steps) == expected


@pytest.mark.parametrize("listed", [BALANCED_STEPS, FAST_STEPS, MAX_STEPS, (0, 29), (0, 5, 29), tuple(range(30))])
def test_a_list_has_its_shape_in_every_run(listed: tuple[int, ...]) -> None:
    """It begins with the first step, ends where the list does, and a longer run computes no fewer."""
    stage = Listed(listed, 30)
    assert stage.of_run(30) == listed
    counts = []
    for steps in range(2, 121):
        found = stage.of_run(steps)
        assert found[0] == 0
        assert abs(found[-1] - listed[-1] / 29 * (steps - 1)) <= (0 if listed[-1] == 29 else 0.5) or len(found) == steps
        assert list(found) == sorted(set(found))
        counts.append(len(found))
        # On the trajectory no computed step is far from where the list has one.
        for step in found:
            near = min(abs(step / (steps - 1) - one / 29) for one in listed)
            gaps = max(after - before for before, after in pairwise(listed)) / 29
            assert near <= gaps / 2 + 1 / (steps - 1) + 1e-9
    assert counts == sorted(counts)
    assert Listed((0,), 30).of_run(7) == (0,)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (4, (0, 1, 2, 3)),
        (8, tuple(range(8))),
        (10, (0, 1, 2, 3, 4, 6, 8, 9)),
        (20, (0, 1, 2, 3, 6, 8, 11, 15, 17, 19)),
        (50, (0, 1, 3, 5, 8, 11, 16, 20, 25, 31, 37, 42, 46, 49)),
    ],
)
def test_the_list_of_the_profile_fast_in_other_runs(steps: int, expected: tuple[int, ...]) -> None:
    assert Listed(FAST_STEPS, 30).of_run(steps) == expected


@every_kind
def test_a_changed_prompt_is_computed(kind: str) -> None:
    """Between two steps the prompt becomes another, as an object or in place: the next step runs all blocks."""
    recipe, new = Recipe(reuse=KINDS[kind]), torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(7))

    def change(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            values["prompt_embeds"] = new.to(values["prompt_embeds"])
        return values

    def change_in_place(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            values["prompt_embeds"].copy_(new)
        return values

    found = [
        _computed_steps(
            build(), recipe, 7, callback_on_step_end=one, callback_on_step_end_tensor_inputs=["prompt_embeds"]
        )
        for one in (change, change_in_place)
    ]
    assert 5 in found[0]
    assert found[0] == found[1]
    if kind == "listed":
        assert 5 not in _computed_steps(build(), recipe, 7)


@every_kind
def test_an_equal_prompt_in_another_tensor_is_no_change(kind: str) -> None:
    def same(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        values["prompt_embeds"] = values["prompt_embeds"].clone()
        return values

    recipe = Recipe(reuse=KINDS[kind])
    changed = _computed_steps(
        build(), recipe, 7, callback_on_step_end=same, callback_on_step_end_tensor_inputs=["prompt_embeds"]
    )
    assert changed == _computed_steps(build(), recipe, 7)


@every_kind
@pytest.mark.parametrize("at", range(7))
def test_a_nan_is_not_hidden(kind: str, at: int) -> None:
    """From whatever step on the latents hold one, so does the result."""
    pipe = build()

    def spoil(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            values["latents"][0, 0, 0, 0, 0] = float("nan")
        return values

    with dit_accel.patch(pipe, replace(POOLED, reuse=KINDS[kind])):
        out = TINY["wan"].run(pipe, steps=7, callback_on_step_end=spoil)
        assert out.isnan().any()
        # And is forgotten with its run.
        assert TINY["wan"].run(pipe, steps=7).isfinite().all()


@every_kind
@pytest.mark.parametrize("after", [1, 4, 8])
def test_what_a_failed_forward_left_serves_nobody(kind: str, after: int) -> None:
    """A loop by hand that goes on behind a failed forward computes the next one, from which it goes on as ever."""
    pipe = build()
    left, middle = iter(range(after)), pipe.transformer.blocks[1]

    def fail(module: Any, args: Any) -> None:
        if next(left, None) is None:
            raise RuntimeError("enough")

    given = {"encoder_hidden_states": torch.randn(1, 16, 32, dtype=torch.float64), "return_dict": False}
    latents = torch.randn(1, 16, 3, 12, 14, dtype=torch.float64)
    computed: list[int] = []
    with torch.no_grad(), dit_accel.patch(pipe, Recipe(reuse=KINDS[kind])):
        middle.register_forward_pre_hook(fail)
        pipe.transformer.blocks[-1].register_forward_hook(lambda *_: computed.append(step))
        pipe.scheduler.set_timesteps(12)
        failed = None
        for step, timestep in enumerate(pipe.scheduler.timesteps):
            try:
                out = pipe.transformer(hidden_states=latents, timestep=timestep[None], **given)[0]
            except RuntimeError:
                failed, left = step, iter(range(1000))
                continue
            finally:
                pipe.scheduler._step_index = step + 1
            latents = latents + 0.1 * out
    if failed is not None and failed < 11:
        assert failed + 1 in computed


def test_without_a_known_step_nothing_is_reused() -> None:
    pipe = build()
    given = {
        "hidden_states": torch.randn(1, 16, 3, 12, 14, dtype=torch.float64),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 16, 32, dtype=torch.float64),
        "return_dict": False,
    }
    with dit_accel.patch(pipe.transformer, Recipe(reuse=Listed((0,), 9))) as handle, torch.no_grad():
        first, second = (pipe.transformer(**given)[0] for _ in range(2))
        assert torch.equal(first, second)
        summary = handle.summary()
    assert (summary.computed_forwards, summary.skipped_forwards) == (2, 0)
    assert "Nothing is reused across steps: the denoising step is unknown." in summary.notes


def test_with_gradients_nothing_is_reused() -> None:
    pipe = build()
    with dit_accel.patch(pipe, Recipe(reuse=Listed((0,), 9))) as handle, torch.enable_grad():
        call = type(pipe).__call__.__wrapped__
        arguments = TINY["wan"].call(torch.Generator().manual_seed(0))
        call(pipe, **arguments, num_inference_steps=3, output_type="latent")
        summary = handle.summary()
    assert summary.skipped_forwards == 0
    assert "Nothing is reused across steps: gradients may be asked for." in summary.notes


@pytest.mark.parametrize("threshold", [None, 0.3])
@pytest.mark.parametrize(("name", "steps"), [("balanced", 17), ("fast", 12), ("max", 9)])
def test_a_profile_patches_by_its_name(name: str, steps: int, threshold: float | None) -> None:
    pipe = build()
    with dit_accel.patch(pipe, name, threshold=threshold) as handle:
        TINY["wan"].run(pipe, steps=30)
        summary = handle.summary()
    assert summary.skipped_forwards > 0
    assert all(layer.plans_made == 2 for layer in summary.layers)
    if threshold is None:
        # The search is in the last dense step, whether it is listed or not.
        assert summary.computed_forwards in (2 * steps, 2 * steps + 2)


@pytest.mark.parametrize("steps", [4, 8])
@pytest.mark.parametrize("name", ["balanced", "fast", "max", "mass", "ear", "pooled"])
def test_of_few_steps_without_guidance_none_is_dense(name: str, steps: int) -> None:
    pipe = build()
    with dit_accel.patch(pipe, name) as handle:
        out = TINY["wan"].run(pipe, steps=steps, guidance_scale=1.0)
        summary = handle.summary()
    assert out.isfinite().all()
    assert not summary.dense_calls
    assert all(layer.sparse_calls > 0 for layer in summary.layers)
    if name in ("balanced", "fast"):
        assert summary.skipped_forwards == 0


def test_of_few_steps_with_guidance_the_first_is_dense() -> None:
    pipe = build()
    with dit_accel.patch(pipe, "mass") as handle:
        TINY["wan"].run(pipe, steps=4, guidance_scale=5.0)
        assert handle.summary().dense_calls["search step"] == 2 * 3  # branches and layers


def test_beside_a_control_network_nothing_is_reused() -> None:
    """What it adds between the blocks is part of what they added, and would be added twice."""
    pipe = TINY["flux"].build()
    zeros = [torch.zeros(1)]
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"controlnet_block_samples": zeros}),
        with_kwargs=True,
        prepend=True,
    )
    with dit_accel.patch(pipe, Recipe(reuse=Listed((0,), 9))) as handle:
        TINY["flux"].run(pipe, steps=3)
        summary = handle.summary()
    assert summary.skipped_forwards == 0
    assert any("a control network adds" in note for note in summary.notes)
    vace = TINY["wan-vace"].build()
    with pytest.raises(ValueError, match="control blocks add to the latents"):
        dit_accel.patch(vace, Recipe(reuse=FirstBlock()))


def test_a_cache_of_the_user_is_left_alone_and_refused_beside_ours() -> None:
    tiny, pipe = TINY["wan"], build()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(0.3))
    expected = tiny.run(pipe, steps=5)
    with pytest.raises(ValueError, match=r"has a cache already \(FirstBlockCacheConfig\).*or patch with reuse none\."):
        dit_accel.patch(pipe, Recipe(reuse=FirstBlock()))
    assert torch.equal(tiny.run(pipe, steps=5), expected)
    with dit_accel.patch(pipe, "dense"):
        assert torch.equal(tiny.run(pipe, steps=5), expected)
    pipe.transformer.disable_cache()
    refused = pytest.raises(ValueError, match="FirstBlockCacheConfig cannot be enabled beside the recipe's own reuse")
    with dit_accel.patch(pipe, Recipe(reuse=FirstBlock())), refused:
        pipe.transformer.enable_cache(FirstBlockCacheConfig(0.3))
    pipe.transformer.enable_cache(FirstBlockCacheConfig(0.3))
    assert torch.equal(tiny.run(pipe, steps=5), expected)


def test_a_cache_of_another_package_is_refused() -> None:
    pipe = build()
    pipe.transformer._is_cached = True  # what cache-dit and ParaAttention leave
    with pytest.raises(ValueError, match="has a cache already"):
        dit_accel.patch(pipe, Recipe(reuse=FirstBlock()))


def test_what_a_recipe_lacks_is_said_before_anything_is_touched() -> None:
    pipe = build()
    with pytest.raises(ValueError, match=r"needs reuse\.ratios, which belong to a checkpoint"):
        dit_accel.patch(pipe, Recipe(reuse=Magnitude()))
    with pytest.raises(ValueError, match="at least two blocks"):
        dit_accel.patch(build(layers=1), Recipe(reuse=FirstBlock()))
    assert dit_accel.patch(pipe, "dense").active


@pytest.mark.parametrize("order", ["compile first", "patch first"])
@every_kind
def test_compiled_blocks_make_the_graphs_that_they_make_alone(kind: str, order: str) -> None:
    tiny = TINY["wan"]
    recipe = replace(POOLED, reuse=KINDS[kind])
    pipe = tiny.build(4)
    with dit_accel.patch(pipe, recipe) as handle:
        eager = tiny.run(pipe, steps=7)
        skipped = handle.summary().skipped_forwards
    plain = tiny.build(4)
    plain.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    with dit_accel.patch(plain, POOLED):
        tiny.run(plain, steps=7)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if order == "patch first":
        handle = dit_accel.patch(pipe, recipe)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    if order == "compile first":
        handle = dit_accel.patch(pipe, recipe)
    assert torch.allclose(tiny.run(pipe, steps=7), eager, atol=1e-5)
    assert handle.summary().skipped_forwards == skipped > 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    handle.remove()


@pytest.mark.parametrize("order", ["compile first", "patch first"])
def test_one_graph_of_the_whole_transformer_is_refused(order: str) -> None:
    tiny, pipe = TINY["wan"], TINY["wan"].build()
    whole = torch.compile(pipe.transformer, fullgraph=True, backend="eager")
    if order == "compile first":
        pipe.transformer = whole
        with pytest.raises(ValueError, match="compile its blocks in place of it"):
            dit_accel.patch(pipe, Recipe(reuse=FirstBlock()))
    else:
        with dit_accel.patch(pipe, Recipe(reuse=FirstBlock())):
            pipe.transformer = whole
            with pytest.raises(Exception, match="compile its blocks in place of it"):
                tiny.run(pipe)


@every_kind
@pytest.mark.parametrize("how", ["groups before", "groups after", "accelerate"])
def test_offloaded_weights(kind: str, how: str) -> None:
    tiny, recipe = TINY["wan"], replace(POOLED, reuse=KINDS[kind])
    pipe = build()
    with dit_accel.patch(pipe, recipe):
        expected = tiny.run(pipe, steps=7)
    cpu = torch.device("cpu")

    def offload() -> None:
        if how == "accelerate":
            # What sequential offloading does to modules with weights of their own.
            for module in (pipe.transformer, *pipe.transformer.blocks):
                add_hook_to_module(module, ModelHook())
        else:
            apply_group_offloading(pipe.transformer, cpu, cpu, offload_type="block_level", num_blocks_per_group=1)

    if how == "groups before":
        offload()
    with dit_accel.patch(pipe, recipe) as handle:
        if how != "groups before":
            offload()
        wrapped = [block.forward for block in pipe.transformer.blocks]
        assert torch.equal(tiny.run(pipe, steps=7), expected)
        assert handle.summary().skipped_forwards > 0
    assert [block.forward for block in pipe.transformer.blocks] == wrapped
