"""A run of a patched pipeline owes nothing to the one before, and a guidance branch nothing to the other."""

from __future__ import annotations

import threading
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch

import dit_accel
from dit_accel.layout import TokenLayout
from dit_accel.patches.progress import is_guided
from dit_accel.run import Bounded, Run
from tests.peaked import RECIPES, peaked
from tests.pipe_calls import SCHEDULERS, VIDEO, Call, another, bare, build, by_hand, forward_arguments, perform
from tests.recipes import POOLED_FULL
from tests.tiny import TINY

DRIFTS_FAR = {"drift": {"schedule.drift_bound": 9.0}}
PRESETS = {name: RECIPES[name] for name in ("mass", "adaspa", "pooled", "window")}


class _Stop(Exception):
    pass


def _stop(*_: Any) -> None:
    raise _Stop


def _shorter(pipe: Any) -> None:
    perform(pipe, "wan", Call(2, seed=1))


def _longer(pipe: Any) -> None:
    perform(pipe, "wan", Call(9, seed=1))


def _the_last_steps_only(pipe: Any) -> None:
    perform(another(pipe, VIDEO["wan"], pipe.scheduler), "wan", Call(6, seed=1, strength=0.4))


def _other_scheduler(pipe: Any) -> None:
    own, pipe.scheduler = pipe.scheduler, SCHEDULERS["wan"]["unipc"]()
    perform(pipe, "wan", Call(4, seed=1))
    pipe.scheduler = own


def _interrupted(pipe: Any) -> None:
    with suppress(_Stop):
        perform(pipe, "wan", Call(6, seed=1), callback_on_step_end=_stop)


def _failed_within_a_step(pipe: Any) -> None:
    """After one of its two branches."""
    outs = iter(range(3))
    hook = pipe.transformer.register_forward_hook(lambda *_: None if next(outs, None) is not None else _stop())
    with suppress(_Stop):
        perform(pipe, "wan", Call(6, seed=1))
    hook.remove()


def _failed_before_its_first_forward(pipe: Any) -> None:
    hook = pipe.transformer.register_forward_pre_hook(_stop, prepend=True)
    with suppress(_Stop):
        perform(pipe, "wan", Call(6, seed=1))
    hook.remove()


def _in_another_thread(pipe: Any) -> None:
    thread = threading.Thread(target=_shorter, args=(pipe,))
    thread.start()
    thread.join()


BEFORE = (
    _shorter,
    _longer,
    _the_last_steps_only,
    _other_scheduler,
    _interrupted,
    _failed_within_a_step,
    _failed_before_its_first_forward,
    _in_another_thread,
)


def _fresh(recipe: Any, call: Call) -> tuple[torch.Tensor, Any]:
    pipe = build("wan")
    with dit_accel.patch(pipe, recipe) as handle:
        return perform(pipe, "wan", call), handle.summary()


@pytest.mark.parametrize("before", BEFORE, ids=lambda before: before.__name__.strip("_"))
@pytest.mark.parametrize("recipe", PRESETS)
def test_whatever_ran_before(recipe, before):
    call = Call(6)
    wanted, alone = _fresh(PRESETS[recipe], call)
    pipe = build("wan")
    with dit_accel.patch(pipe, PRESETS[recipe]) as handle:
        before(pipe)
        earlier = handle.summary()
        assert torch.equal(perform(pipe, "wan", call), wanted)
        summary = handle.summary()
    assert summary.sparse_calls - earlier.sparse_calls == alone.sparse_calls
    for reason, count in alone.dense_calls.items():
        assert summary.dense_calls[reason] - earlier.dense_calls.get(reason, 0) == count


@pytest.mark.parametrize("before", BEFORE, ids=lambda before: before.__name__.strip("_"))
@pytest.mark.parametrize("recipe", ["mass", "pooled"])
def test_a_bare_forward_after_a_run(recipe, before):
    """It is of no run: nothing is dense for a step's sake, and no plan of a step serves it."""
    pipe = build("wan")
    with dit_accel.patch(pipe, PRESETS[recipe]):
        wanted = bare(pipe.transformer, "wan", 0, 0)
    with dit_accel.patch(pipe, PRESETS[recipe]) as handle:
        before(pipe)
        earlier = handle.summary()
        assert torch.equal(bare(pipe.transformer, "wan", 0, 0), wanted)
        summary = handle.summary()
    assert summary.sparse_calls == earlier.sparse_calls + 2
    assert summary.dense_calls == earlier.dense_calls


@pytest.mark.parametrize("recipe", ["mass", "drift"])
def test_bare_forwards_on_both_sides_of_a_run(recipe):
    """Successive ones share their plans; those of before a run do not serve those after it."""
    lasting = RECIPES[recipe].with_fields({"schedule.refresh_every": 99} | DRIFTS_FAR.get(recipe, {}))
    pipe = build("wan")
    with dit_accel.patch(pipe, lasting):
        wanted = bare(pipe.transformer, "wan", 0, 1)
    with dit_accel.patch(pipe, lasting) as handle:
        bare(pipe.transformer, "wan", 0, 0)
        assert not torch.equal(bare(pipe.transformer, "wan", 0, 1), wanted)
        assert sum(layer.plans_made for layer in handle.summary().layers) == 2
        _shorter(pipe)
        assert torch.equal(bare(pipe.transformer, "wan", 0, 1), wanted)


@pytest.mark.parametrize("held", [False, True], ids=["", "held"])
@pytest.mark.parametrize("recipe", PRESETS)
def test_a_run_that_begins_behind_the_end_of_the_one_before(recipe, held):
    """Its first step is larger than the last one of the run before, whose timesteps somebody may still hold."""
    call = Call(10, strength=0.4)
    pipe = build("wan")
    video = another(pipe, VIDEO["wan"], pipe.scheduler)
    with dit_accel.patch(pipe, PRESETS[recipe]):
        wanted = perform(video, "wan", call)
    with dit_accel.patch(pipe, PRESETS[recipe]):
        perform(video, "wan", Call(4, seed=1, strength=0.5))
        holds = pipe.scheduler.timesteps if held else None
        assert torch.equal(perform(video, "wan", call), wanted)
        del holds


@pytest.mark.parametrize("shared", [False, True], ids=["own scheduler", "one scheduler"])
@pytest.mark.parametrize("first", ["patched", "other"])
@pytest.mark.parametrize("recipe", PRESETS)
def test_two_pipelines_over_one_transformer(recipe, first, shared):
    calls = {"patched": Call(4, seed=1), "other": Call(6)}
    wanted = {name: _fresh(PRESETS[recipe], call)[0] for name, call in calls.items()}
    pipe = build("wan")
    pipes = {"patched": pipe, "other": another(pipe, scheduler=pipe.scheduler if shared else None)}
    with dit_accel.patch(pipe, PRESETS[recipe]):
        for name in sorted(pipes, key=lambda name: name != first) * 2:
            assert torch.equal(perform(pipes[name], "wan", calls[name]), wanted[name])


@pytest.mark.parametrize("recipe", PRESETS)
def test_a_loop_by_hand_is_a_run(recipe):
    """As often as somebody sets the timesteps, and not of the pipeline's runs in between."""
    pipe = build("wan")
    with dit_accel.patch(pipe, PRESETS[recipe]):
        wanted = by_hand(pipe, "wan", 5, 0, 0)
    with dit_accel.patch(pipe, PRESETS[recipe]):
        for before in (_shorter, lambda pipe: by_hand(pipe, "wan", 3, 1, 1), _interrupted):
            before(pipe)
            assert torch.equal(by_hand(pipe, "wan", 5, 0, 0), wanted)


def _steps_seen(pipe: Any, runner: Any, family: str, call: Call) -> list[tuple[int, float]]:
    """Step and noise level of every forward, as the first layer's calls have them, beside the true timestep."""
    seen, times = [], []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: times.append(float(kwargs["timestep"].max())), with_kwargs=True
    )
    patched = dit_accel.patch(pipe, RECIPES["pooled"])
    with patched, patched.observe(lambda name, one: one.layer == 0 and seen.append(one.step)):
        perform(runner, family, call)
    hook.remove()
    return [(step.index, step.num_steps, step.sigma, time) for step, time in zip(seen, times, strict=True)]


@pytest.mark.parametrize("family", sorted(VIDEO))
def test_a_run_that_begins_late(family):
    """Video or image to video or image: the first forward is not of step 0, nor of its noise."""
    if family == "ltx":
        pytest.skip("its other pipeline begins at the first step")
    pipe = build(family)
    seen = _steps_seen(pipe, another(pipe, VIDEO[family]), family, Call(8, strength=0.5))
    indices = [index for index, *_ in seen]
    assert sorted(set(indices)) == [4, 5, 6, 7]
    assert indices == sorted(indices)
    assert {steps for _, steps, *_ in seen} == {8}
    for _, _, sigma, time in seen:
        if family in ("flux", "qwen-image"):
            assert sigma == pytest.approx(time, rel=1e-3)
        elif family != "cogvideox":  # its timesteps are no noise levels
            assert sigma == pytest.approx(time / 1000, rel=1e-3)


@pytest.mark.parametrize("start", [0, 3])
def test_a_loop_by_hand_that_begins_late(start):
    pipe, seen = build("wan"), []
    given = forward_arguments("wan", 0, 0)
    patched = dit_accel.patch(pipe, RECIPES["pooled"])
    with patched, patched.observe(lambda name, one: one.layer == 0 and seen.append(one.step.index)), torch.no_grad():
        pipe.scheduler.set_timesteps(6)
        sample = given["hidden_states"]
        for timestep in pipe.scheduler.timesteps[start:]:
            out = pipe.transformer(**given | {"hidden_states": sample, "timestep": timestep[None]})[0]
            sample = pipe.scheduler.step(out, timestep, sample, return_dict=False)[0]
    assert seen == list(range(start, 6))


@pytest.mark.parametrize("recipe", ["pooled", "mass", "adaspa"])
@pytest.mark.parametrize("family", ["wan", "wan2.2", "wan-vace", "hunyuan", "flux", "qwen-image"])
def test_branches_without_a_name(family, recipe):
    """The two forwards of a step are told apart by their order where a pipeline opens no context for them."""
    pipe, call = build(family), Call(5)
    with dit_accel.patch(pipe, RECIPES[recipe]):
        wanted = perform(pipe, family, call)
    with dit_accel.patch(pipe, RECIPES[recipe]):
        for name, model in pipe.components.items():
            if name.startswith("transformer") and model is not None:
                model.cache_context = lambda name, **more: nullcontext()
        assert torch.equal(perform(pipe, family, call), wanted)


@pytest.mark.parametrize("recipe", ["pooled", "mass", "adaspa"])
@pytest.mark.parametrize("guided", [False, True])
def test_video_to_video_of_all_steps_is_text_to_video(recipe, guided):
    pipe = build("wan")
    video = another(pipe, VIDEO["wan"])
    call = Call(5, guided=guided, strength=1.0)
    found = []
    for runner in (pipe, video):
        with dit_accel.patch(pipe, RECIPES[recipe]):
            found.append(perform(runner, "wan", call))
    assert torch.equal(*found)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("family", ["hunyuan", "qwen-image", "ltx"])
def test_a_branch_does_not_hide_the_keys_of_the_other(family, named):
    """Prompts hide different keys: with every block kept the output is the model's own, in whichever branch."""
    pipe, call = build(family), Call(4)
    plain = perform(pipe, family, call)
    with dit_accel.patch(pipe, POOLED_FULL.with_fields({"schedule.refresh_every": 4})) as handle:
        if not named:
            pipe.transformer.cache_context = lambda name, **more: nullcontext()
        found = perform(pipe, family, call)
        assert handle.summary().sparse_calls
    assert (found - plain).norm() <= 1e-4 * plain.norm()


@pytest.mark.parametrize("recipe", ["pooled", "window", "mass"])
def test_masks_of_successive_forwards(recipe):
    """A plan leaves out blocks that a mask hides; the next forward's mask may show them."""
    given = dict(forward_arguments("hunyuan", 0, 0))
    given["encoder_hidden_states"] = torch.randn(1, 80, 16, generator=torch.Generator().manual_seed(0))
    first, second = torch.ones(1, 80), torch.ones(1, 80)
    first[:, 10:] = 0
    second[:, 75:] = 0

    def forwards(masks: list[torch.Tensor]) -> list[torch.Tensor]:
        held, outs = torch.empty(1, 80), []
        for mask in masks:
            held.copy_(mask)
            outs.append(model(**given | {"encoder_attention_mask": held, "return_dict": False})[0])
        return outs

    model = build("hunyuan").transformer
    with torch.no_grad():
        with dit_accel.patch(model, RECIPES[recipe]):
            (wanted,) = forwards([second])
        with dit_accel.patch(model, RECIPES[recipe]):
            found = forwards([first, second, first])
    assert torch.equal(found[1], wanted)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_what_a_run_keeps_is_of_a_masks_content():
    run, layout = Run(), TokenLayout((1, 4, 4), 0, 20)
    mask = torch.ones(1, 20, dtype=torch.bool)
    whole = run.kept(layout, mask, 0)
    assert run.kept(layout, mask.clone(), 1) is whole
    assert run.kept(layout, mask, 1) is whole
    mask[:, 18:] = False  # the caller's own tensor, before its next forward
    part = run.kept(layout, mask, 2)
    assert part is not whole
    assert run.kept(layout, mask, 2) is part
    assert run.kept(layout, torch.ones(1, 20, dtype=torch.bool), 2) is whole
    assert run.kept(layout, None, 2) not in (whole, part)
    assert run.kept(TokenLayout((1, 2, 8), 0, 20), mask, 2) is not part


@pytest.mark.parametrize("recipe", ["pooled", "window"])
def test_portrait_and_landscape_in_turn(recipe):
    """A count of tokens is no shape: static tables and kept plans are of a grid."""
    pipe = build("wan")
    wanted = {}
    for size in (0, 1):
        with dit_accel.patch(pipe, RECIPES[recipe]):
            wanted[size] = perform(pipe, "wan", Call(4, size))
    with dit_accel.patch(pipe, RECIPES[recipe]):
        for size in (0, 1, 0):
            assert torch.equal(perform(pipe, "wan", Call(4, size)), wanted[size])


@pytest.mark.parametrize("family", ["wan-vace", "sd3", "qwen-image"])
@pytest.mark.parametrize("recipe", ["pooled", "adaspa"])
def test_a_compiled_transformer_whose_layers_run_in_another_order(family, recipe):
    """Nobody announces a forward within a graph: it begins where a layer comes again."""
    torch._dynamo.reset()
    call, found = Call(5), []
    for compiled in (False, True):
        pipe, steps = build(family), []
        with dit_accel.patch(pipe, RECIPES[recipe]) as handle:
            if compiled:
                pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend="eager")
            with handle.observe(lambda name, one, steps=steps: steps.append((one.layer, one.step.index))):
                out = perform(pipe, family, call)
            found.append((out, steps, handle.summary()))
    (eager, steps, summary), (compiled_out, compiled_steps, compiled_summary) = found
    assert steps == compiled_steps
    assert torch.allclose(eager, compiled_out, atol=1e-5)
    assert summary.sparse_calls == compiled_summary.sparse_calls
    assert summary.dense_calls == compiled_summary.dense_calls


def test_training_after_a_validation_in_inference_mode():
    """Tables and plans that a validation made are saved for a training's backward."""
    pytest.importorskip("triton")
    model = peaked(TINY["cogvideox"].build(1).transformer, 1.0).train()
    given = forward_arguments("cogvideox", 0, 0)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(**given | {"return_dict": False})[0].square().mean().backward()
        return model.transformer_blocks[0].attn1.to_q.weight.grad.clone()

    for recipe in ("window", "pooled"):
        with dit_accel.patch(model, RECIPES[recipe].with_fields({"schedule.dense_fraction": 0.0}), backend="triton"):
            wanted = gradient()
        with dit_accel.patch(model, RECIPES[recipe], backend="triton"):
            with torch.inference_mode():
                model(**given)
            assert torch.equal(gradient(), wanted)


def test_threads_share_a_bounded_dictionary():
    shared: Bounded[int] = Bounded(2)
    made, errors = [], []

    def use() -> None:
        try:
            for round_ in range(3000):
                assert shared.get(round_ % 5, lambda: made.append(1) or round_ % 5) == round_ % 5  # noqa: B023
        except Exception as error:  # shown by the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(shared.entries) == 2


def test_a_bare_layout_is_of_the_call():
    """LatentTokens of one forward do not serve another thread's: each has its own."""
    pipe = build("wan")
    grids: dict[int, set[Any]] = {0: set(), 2: set()}

    def look(name: str, one: Any) -> None:
        assert isinstance(one.layout, TokenLayout)
        grids[threading.current_thread().size].add(one.layout.grid)  # type: ignore[attr-defined]

    threads = []
    with dit_accel.patch(pipe, RECIPES["pooled"]) as handle, handle.observe(look):
        for size in grids:
            thread = threading.Thread(target=bare, args=(pipe.transformer, "wan", size, 0))
            thread.size = size  # type: ignore[attr-defined]
            threads.append(thread)
            thread.start()
        for thread in threads:
            thread.join()
    assert {size: len(found) for size, found in grids.items()} == {0: 1, 2: 1}
    assert grids[0] != grids[2]


def test_whether_a_pipeline_is_guided_is_asked_with_care():
    class Pipe:
        """The property of diffusers' pipelines."""

        def __init__(self, **given: Any) -> None:
            vars(self).update(given)

        @property
        def do_classifier_free_guidance(self) -> Any:
            return self._guidance_scale > 1

    found = [
        is_guided(pipe)
        for pipe in (
            *(Pipe(_guidance_scale=scale) for scale in (5.0, 1.0, None, torch.tensor([1.0, 5.0]))),
            *(Pipe(), object(), None),  # not called yet, and without the property
        )
    ]
    assert found == [True] + [False] * 6
