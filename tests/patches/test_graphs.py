"""Blocks that are replayed as graphs: the bits and the counts of a run without them, whatever happens in between.

A stand-in captures on a CPU (graph_stand_in.py); test_graphs_gpu.py captures CUDA graphs.
"""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from peft import LoraConfig
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import dit_accel
from dit_accel.acceleration.api import accelerate, change_beside_attention
from dit_accel.patches.graphs import kept
from dit_accel.patches.graphs.arguments import CannotCapture, put_together, taken_apart
from dit_accel.patches.graphs.install import REPLACED
from dit_accel.patches.graphs.likeness import Likeness
from dit_accel.patches.graphs.served import Served
from dit_accel.patches.graphs.static import Slots
from tests import pipe_calls
from tests.patches.graphed import assert_alike, facts, notes, with_graphs
from tests.pipe_calls import Call
from tests.tiny import TINY

STEPS = 8
MASKED = ("hunyuan", "qwen-image")
"""Families that hide keys in every call."""
Change = Callable[[Any], object]


@pytest.mark.parametrize("name", TINY)
def test_a_run_with_graphs_has_the_bits_and_counts_of_one_without(name, graphs):
    tiny = TINY[name]
    pipe = tiny.build()
    with dit_accel.patch(pipe, "mass", density=0.3) as handle:
        handle.record_steps()
        wanted = tiny.run(pipe, steps=STEPS)
        counted = facts(handle)
    with with_graphs(dit_accel.patch(pipe, "mass", density=0.3)) as handle:
        handle.record_steps()
        assert tiny.run(pipe, steps=STEPS).equal(wanted)
        assert facts(handle) == counted
        assert handle.summary().replayed_calls == sum(layer.replayed_calls for layer in handle.summary().layers)
        assert bool(handle.summary().replayed_calls) == (name not in MASKED)
        assert bool(notes(handle)) == (name in MASKED)
    assert bool(graphs.replayed) == (name not in MASKED)


@pytest.mark.parametrize("recipe", ["balanced", "fast", "max", "ear", "recycled"])
def test_profiles_decide_between_replayed_blocks(recipe, graphs):
    pipe = pipe_calls.build("wan")
    calls = (Call(14, 0), Call(9, 1), Call(12, 0, guided=False))
    with dit_accel.patch(pipe, recipe) as handle:
        wanted = [pipe_calls.perform(pipe, "wan", call) for call in calls]
        counted = facts(handle)
    with with_graphs(dit_accel.patch(pipe, recipe)) as handle:
        for call, clip in zip(calls, wanted, strict=True):
            # On a CPU a plan that has served a few calls is read in another way, of other rounding.
            atol = 1e-5 * float(clip.abs().max()) if recipe == "recycled" else 0.0
            torch.testing.assert_close(pipe_calls.perform(pipe, "wan", call), clip, rtol=0, atol=atol)
        assert facts(handle) == counted
    assert graphs.replayed > graphs.captured > 0


@pytest.mark.parametrize(
    "fields",
    [
        {"schedule.refresh_every": 3, "schedule.refresh_at": ()},
        {"schedule.refresh_every": 1_000, "schedule.dense_layers": (0,), "schedule.refresh_at": ()},
        {"schedule.refresh_at": (0.4, 0.7), "schedule.dense_fraction": 0.0},
        {"select.density": 0.2, "compensate": "residual", "precision": "int8"},
    ],
    ids=["refreshed", "a dense layer", "no dense phase", "means in int8"],
)
def test_plans_that_change_are_captured_anew(fields, graphs):
    assert_alike(dit_accel.presets.resolve("mass").with_fields(fields), steps=13)
    assert graphs.replayed


@pytest.mark.parametrize("profile", ["balanced", "max"])
@pytest.mark.parametrize(
    "fields", [{"schedule.refresh_every": 3, "schedule.refresh_at": ()}, {"schedule.choose_every": 3}], ids=str
)
def test_plans_age_by_the_steps_that_a_recipe_does_not_skip(profile, fields, graphs):
    assert_alike(dit_accel.presets.resolve(profile).with_fields(fields), steps=20)
    assert graphs.replayed


def test_a_call_that_is_dense_for_another_reason_than_its_layer_is_counted_by_it(graphs):
    recipe = dit_accel.presets.resolve("mass").with_fields({"schedule.dense_layers": (0,)})
    pipe = TINY["wan"].build()
    with dit_accel.patch(pipe, recipe) as handle:
        (session,) = handle.sessions.values()
        session.engine.automatic = True  # which finds these too short
        TINY["wan"].run(pipe, steps=STEPS)
        counted = facts(handle)
        handle.reset()
        with_graphs(handle)
        TINY["wan"].run(pipe, steps=STEPS)
        assert facts(handle) == counted


def test_a_run_that_turns_its_picture_is_not_replayed_with_the_plan_of_before(graphs):
    """As many tokens, of another grid."""

    @torch.no_grad()
    def denoise(pipe: Any) -> list[torch.Tensor]:
        givens = [pipe_calls.forward_arguments("wan", size, 0) for size in (0, 1)]
        pipe.scheduler.set_timesteps(12)
        outs = []
        for index, timestep in enumerate(pipe.scheduler.timesteps):
            given = givens[index // 6]
            time = timestep.expand(given["timestep"].shape)
            outs.append(pipe.transformer(**given | {"timestep": time, "return_dict": False})[0])
            pipe.scheduler.step(outs[-1], timestep, given["hidden_states"])
        return outs

    pipe = pipe_calls.build("wan")
    with dit_accel.patch(pipe, "mass", density=0.3):
        wanted = denoise(pipe)
    with with_graphs(dit_accel.patch(pipe, "mass", density=0.3)):
        found = denoise(pipe)
    assert all(one.equal(other) for one, other in zip(found, wanted, strict=True))
    assert graphs.replayed


def half_the_weights(pipe: Any) -> None:
    with torch.no_grad():
        pipe.transformer.blocks[1].ffn.net[0].proj.weight.mul_(0.5)


def other_weights(pipe: Any) -> None:
    weight = pipe.transformer.blocks[1].ffn.net[0].proj.weight
    weight.data = weight.data * 0.5


def another_parameter(pipe: Any) -> None:
    layer = pipe.transformer.blocks[0].attn1.to_q
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 0.5)


def another_module(pipe: Any) -> None:
    ffn = pipe.transformer.blocks[1].ffn
    ffn.net[0] = copy.deepcopy(ffn.net[0])
    half_the_weights(pipe)


def a_hook(pipe: Any) -> None:
    pipe.transformer.blocks[1].ffn.register_forward_hook(lambda *_: _[-1] * 0.5)


def another_forward(pipe: Any) -> None:
    ffn = pipe.transformer.blocks[0].ffn
    whole = ffn.forward
    ffn.forward = lambda x: whole(x) * 0.5


def a_lora(pipe: Any) -> None:
    torch.manual_seed(3)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))


def no_bias(pipe: Any) -> None:
    pipe.transformer.blocks[1].ffn.net[2].bias = None


def a_setting(pipe: Any) -> None:
    pipe.transformer.blocks[1].norm2.eps = 0.5


def strides(pipe: Any) -> None:
    with torch.no_grad():
        pipe.transformer.blocks[1].attn2.to_q.weight.t_()


def a_cache(pipe: Any) -> None:
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.5))


CHANGES: tuple[Change, ...] = (
    half_the_weights,
    other_weights,
    another_parameter,
    another_module,
    a_hook,
    another_forward,
    a_lora,
    no_bias,
    a_setting,
    strides,
    a_cache,
)


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
def test_what_changes_between_two_steps_is_seen(change, graphs):
    def clip(graphs_too: bool) -> torch.Tensor:
        pipe = TINY["wan"].build()

        def at_step(pipe: Any, step: int, _timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            if step == 5:
                change(pipe)
            return given

        with dit_accel.patch(pipe, "mass", density=0.3) as handle:
            if graphs_too:
                with_graphs(handle)
            return TINY["wan"].run(pipe, steps=9, callback_on_step_end=at_step)

    wanted = clip(False)
    before = graphs.replayed
    assert clip(True).equal(wanted)
    assert graphs.replayed > before


def test_a_block_is_no_longer_alike_when_its_processor_or_the_attention_backend_changes():
    block = TINY["wan"].build().transformer.eval().blocks[0]
    processor = block.attn1.processor
    processor.scale, processor.table = [1.0, 0.5], torch.zeros(2)
    likeness = Likeness(block)
    assert likeness.holds()
    processor.scale[1] = 0.25
    assert not likeness.holds()
    processor.scale[1] = 0.5
    assert likeness.holds()
    processor.table = torch.zeros(2)
    assert not likeness.holds()
    likeness = Likeness(block)
    with attention_backend("_native_math"):
        assert not likeness.holds()
    assert likeness.holds()
    del processor.scale
    processor.weight = 1.0
    assert not likeness.holds()


def with_dropout(pipe: Any) -> None:
    pipe.transformer.blocks[0].attn1.to_out[1].p = 0.5
    pipe.transformer.train()


def called_as(block: Any, call: Callable[..., Any], forward: Callable[..., Any] | None = None) -> None:
    kind = type(block)
    block.__class__ = type(
        kind.__name__, (kind,), {"__call__": call, "__module__": __name__} | ({"forward": forward} if forward else {})
    )


def twice(pipe: Any) -> None:
    called_as(
        pipe.transformer.blocks[0],
        lambda self, hidden, *args: torch.nn.Module.__call__(
            self, torch.nn.Module.__call__(self, hidden, *args), *args
        ),
    )


def tensors_of_inference(pipe: Any) -> None:
    with torch.inference_mode():
        one = torch.ones(24)
    inner = type(pipe.transformer.blocks[0]).forward
    called_as(
        pipe.transformer.blocks[0],
        lambda self, *args: torch.nn.Module.__call__(self, *args, extra=one),
        lambda self, *args, extra: inner(self, *args) + extra,
    )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (with_dropout, "Dropout is in training mode: call eval()"),
        (a_hook, "FeedForward has a hook of another package, which a replay would not call"),
        (another_forward, "another package has replaced the forward of FeedForward, as offloading does"),
        (a_lora, "Linear of peft may change its scale: fuse the adapter"),
        (twice, "a block runs more than once in a forward"),
        (tensors_of_inference, "tensors of torch.inference_mode do not count their changes: use torch.no_grad"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_a_replay_would_leave_out_is_not_captured(change, why, graphs):
    def clip(graphs_too: bool) -> tuple[torch.Tensor, dict[str, Any]]:
        pipe = TINY["wan"].build()
        change(pipe)
        torch.manual_seed(0)
        with dit_accel.patch(pipe, "mass", density=0.3) as handle:
            if graphs_too:
                with_graphs(handle)
            found = TINY["wan"].run(pipe, steps=STEPS)
            assert notes(handle) == ([f"Blocks run without CUDA graphs: {why}."] if graphs_too else [])
            return found, facts(handle)

    wanted, counted = clip(False)
    found, also = clip(True)
    assert found.equal(wanted)
    assert also == counted


def test_a_block_that_runs_twice_from_some_step_on(graphs):
    def clip(graphs_too: bool) -> tuple[torch.Tensor, dict[str, Any]]:
        pipe = TINY["wan"].build()

        def at_step(pipe: Any, step: int, _timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            if step == 5:
                assert not graphs_too or branches_of(pipe)
                twice(pipe)
            if step == 6 and graphs_too:
                assert not branches_of(pipe)  # no more of any block
            return given

        with dit_accel.patch(pipe, "mass", density=0.3) as handle:
            if graphs_too:
                with_graphs(handle)
            found = TINY["wan"].run(pipe, steps=10, callback_on_step_end=at_step)
            if graphs_too:
                assert notes(handle) == ["Blocks run without CUDA graphs: a block runs more than once in a forward."]
            return found, facts(handle)

    wanted, counted = clip(False)
    found, also = clip(True)
    assert found.equal(wanted)
    assert also == counted
    assert graphs.replayed


def test_a_patch_that_is_removed_within_a_run_keeps_nothing(graphs):
    pipe = TINY["wan"].build()
    handle = with_graphs(dit_accel.patch(pipe, "mass", density=0.3))
    (captured,) = {block._compiled_call_impl.graphs for block in pipe.transformer.blocks}

    def at_step(_pipe: Any, step: int, _timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 6:
            assert captured.kept._thread.runs
            handle.remove()
        return given

    TINY["wan"].run(pipe, steps=10, callback_on_step_end=at_step)
    assert not captured.kept._thread.runs
    assert graphs.replayed


def test_outputs_that_are_tapped_are_all_seen(graphs):
    def tapped(graphs_too: bool) -> list[int]:
        pipe, seen = TINY["wan"].build(), []
        with dit_accel.patch(pipe, "mass", density=0.3) as handle:
            if graphs_too:
                with_graphs(handle)
            (session,) = handle.sessions.values()

            def tap(layer: int, out: torch.Tensor, _dense: object) -> torch.Tensor:
                seen.append(layer)
                return out

            def at_step(_pipe: Any, step: int, _timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
                session.engine.output_tap = tap if step in (5, 6) else None
                return given

            TINY["wan"].run(pipe, steps=10, callback_on_step_end=at_step)
        return seen

    assert tapped(True) == tapped(False) != []
    assert graphs.replayed


def test_steps_that_are_timed_are_not_replayed(graphs):
    pipe = TINY["wan"].build()
    with with_graphs(dit_accel.patch(pipe, "mass", density=0.3)) as handle:
        handle.record_steps(seconds=True)
        TINY["wan"].run(pipe, steps=STEPS)
        assert notes(handle) == ["Blocks run without CUDA graphs: the calls of recorded steps are timed one by one."]
    assert not graphs.captured


def test_what_is_switched_between_two_steps_is_seen(graphs):
    seen: list[int] = []

    def clip(graphs_too: bool) -> tuple[torch.Tensor, int]:
        pipe = TINY["wan"].build()
        handle = dit_accel.patch(pipe, "mass", density=0.3)
        if graphs_too:
            with_graphs(handle)
        contexts = {4: handle.disabled(), 6: handle.observe(lambda _name, call: seen.append(call.layer))}

        def at_step(pipe: Any, step: int, _timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            if step in contexts:
                contexts[step].__enter__()
            if step - 1 in contexts:
                contexts[step - 1].__exit__(None, None, None)
            return given

        seen.clear()
        found = TINY["wan"].run(pipe, steps=10, callback_on_step_end=at_step)
        handle.remove()
        return found, len(seen)

    wanted, observed = clip(False)
    found, also = clip(True)
    assert found.equal(wanted)
    assert also == observed > 0
    assert graphs.replayed


def test_a_capture_that_fails_leaves_the_run_as_it_is(graphs):
    pipe = TINY["wan"].build()
    with dit_accel.patch(pipe, "mass", density=0.3) as handle:
        wanted = TINY["wan"].run(pipe, steps=STEPS)
        counted = facts(handle)
    graphs.fails = RuntimeError("operation not permitted when stream is capturing\nmore")
    with with_graphs(dit_accel.patch(pipe, "mass", density=0.3)) as handle:
        assert TINY["wan"].run(pipe, steps=STEPS).equal(wanted)
        assert facts(handle) == counted
        (note,) = notes(handle)
    assert note == ("Blocks run without CUDA graphs: RuntimeError: operation not permitted when stream is capturing.")
    assert not graphs.captured


def test_results_that_somebody_keeps_stay(graphs, monkeypatch):
    """As U-shaped models keep them for later blocks."""
    pipe = TINY["wan"].build()
    kept: list[torch.Tensor] = []
    call = torch.nn.Module.__call__
    kind = type(pipe.transformer.blocks[0])
    monkeypatch.setattr(
        kind, "__call__", lambda self, *args, **kwargs: (kept.append(out := call(self, *args, **kwargs)), out)[1]
    )
    with dit_accel.patch(pipe, "mass", density=0.3):
        wanted = TINY["wan"].run(pipe, steps=STEPS)
    eager, kept = kept, []
    with with_graphs(dit_accel.patch(pipe, "mass", density=0.3)):
        assert TINY["wan"].run(pipe, steps=STEPS).equal(wanted)
    assert len(kept) == len(eager)
    assert all(one.equal(other) for one, other in zip(kept, eager, strict=True))
    assert graphs.captured


def test_a_block_that_returns_other_numbers_is_not_replayed(graphs):
    def clip(graphs_too: bool) -> tuple[torch.Tensor, list[str]]:
        pipe = TINY["wan"].build()
        steps = [0]

        class Scaled(type(pipe.transformer.blocks[0])):  # type: ignore[misc]
            def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, float]:
                return super().forward(*args, **kwargs), 1.0 + steps[0] / 10

            def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
                out, scale = super().__call__(*args, **kwargs)
                return out * scale

        for block in pipe.transformer.blocks:
            block.__class__ = Scaled

        def at_step(_pipe: Any, step: int, _timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            steps[0] = step
            return given

        with dit_accel.patch(pipe, "mass", density=0.3) as handle:
            if graphs_too:
                with_graphs(handle)
            return TINY["wan"].run(pipe, steps=STEPS, callback_on_step_end=at_step), notes(handle)

    wanted, _ = clip(False)
    found, (note,) = clip(True)
    assert found.equal(wanted)
    assert note.endswith("a block returned something of another form than before.")


@pytest.mark.parametrize("changes", [{5}, {4, 5, 6, 7, 8, 9}], ids=["once", "at every step"])
def test_a_block_that_is_given_other_numbers_or_changed_tensors(changes, graphs):
    def clip(graphs_too: bool) -> torch.Tensor:
        pipe = TINY["wan"].build()
        given_too: dict[str, Any] = {"scale": 1.0, "among": {"others": [torch.ones(32, 1).expand(32, 24)]}}

        class Scaled(type(pipe.transformer.blocks[0])):  # type: ignore[misc]
            def forward(self, *args: Any, scale: float, among: Any, **kwargs: Any) -> torch.Tensor:
                return super().forward(*args, **kwargs) * scale + among["others"][0][0]

            def __call__(self, *args: Any) -> torch.Tensor:
                return super().__call__(*args, **given_too)

        for block in pipe.transformer.blocks:
            block.__class__ = Scaled

        def at_step(_pipe: Any, step: int, _timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            if step in changes:
                given_too["scale"] += 0.125
            if step == 7:
                given_too["among"]["others"][0][:, :1].add_(0.25)
            return given

        with dit_accel.patch(pipe, "mass", density=0.3) as handle:
            if graphs_too:
                with_graphs(handle)
            found = TINY["wan"].run(pipe, steps=12, callback_on_step_end=at_step)
            assert not notes(handle)
            return found

    wanted = clip(False)
    assert clip(True).equal(wanted)
    assert graphs.replayed


def test_a_place_that_somebody_still_holds_is_not_filled(graphs):
    """A block's input of one step is kept beside it in the next, where the block is given another."""

    def clip(graphs_too: bool) -> torch.Tensor:
        pipe = TINY["wan"].build()
        now = [0]

        class Skips(type(pipe.transformer.blocks[1])):  # type: ignore[misc]
            def __call__(self, hidden_states: torch.Tensor, *args: Any) -> torch.Tensor:
                if now[0] < 6:
                    return super().__call__(hidden_states, *args)
                return super().__call__(hidden_states * 0.5, *args) + hidden_states

        pipe.transformer.blocks[1].__class__ = Skips

        def at_step(_pipe: Any, step: int, _timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            now[0] = step + 1
            return given

        with dit_accel.patch(pipe, "mass", density=0.3) as handle:
            if graphs_too:
                with_graphs(handle)
            return TINY["wan"].run(pipe, steps=10, callback_on_step_end=at_step)

    assert clip(True).equal(clip(False))
    assert graphs.replayed


def test_a_block_that_changes_what_it_is_given_is_not_replayed(graphs):
    def clip(graphs_too: bool) -> tuple[torch.Tensor, list[str]]:
        pipe = TINY["wan"].build()

        class Changes(type(pipe.transformer.blocks[0])):  # type: ignore[misc]
            def forward(self, hidden_states: torch.Tensor, *args: Any) -> torch.Tensor:
                return super().forward(hidden_states.mul_(1.25), *args)

            def __call__(self, hidden_states: torch.Tensor, *args: Any) -> torch.Tensor:
                return super().__call__(hidden_states, *args) + hidden_states

        for block in pipe.transformer.blocks:
            block.__class__ = Changes
        with dit_accel.patch(pipe, "mass", density=0.3) as handle:
            if graphs_too:
                with_graphs(handle)
            return TINY["wan"].run(pipe, steps=STEPS), notes(handle)

    wanted, _ = clip(False)
    found, (note,) = clip(True)
    assert found.equal(wanted)
    assert note.endswith("a block changes what it is given.")


def test_a_plan_that_changes_within_a_capture_is_seen(graphs, monkeypatch):
    """Should somebody foresee wrongly which plan a call will have."""
    recipe = dit_accel.presets.resolve("mass").with_fields({"schedule.refresh_every": 2, "schedule.refresh_at": ()})
    pipe = TINY["wan"].build()
    with dit_accel.patch(pipe, recipe):
        wanted = TINY["wan"].run(pipe, steps=STEPS)
    monkeypatch.setattr(Served, "serves", lambda *_: True)
    with with_graphs(dit_accel.patch(pipe, recipe)) as handle:
        assert TINY["wan"].run(pipe, steps=STEPS).equal(wanted)
        (note,) = notes(handle)
    assert note.endswith("a layer's plan changed while it was captured.")


def test_runs_with_other_sizes_and_prompts(graphs):
    pipe = pipe_calls.build("wan")
    calls = (Call(9, 0), Call(9, 1), Call(7, 2), Call(9, 0, guided=False), Call(9, 0))
    with dit_accel.patch(pipe, "mass", density=0.3):
        wanted = [pipe_calls.perform(pipe, "wan", call) for call in calls]
    with with_graphs(dit_accel.patch(pipe, "mass", density=0.3)):
        for call, clip in zip(calls, wanted, strict=True):
            assert pipe_calls.perform(pipe, "wan", call).equal(clip)
    assert graphs.replayed


def test_nothing_of_a_run_is_kept_when_it_has_ended(graphs):
    pipe = TINY["wan"].build()
    with with_graphs(dit_accel.patch(pipe, "mass", density=0.3)) as handle:
        TINY["wan"].run(pipe, steps=STEPS)
        (captured,) = {block._compiled_call_impl.graphs for block in pipe.transformer.blocks}
        assert not captured.kept._thread.runs
        assert graphs.released == 1
        (session,) = handle.sessions.values()
        assert not session.engine.planner.of_graphs._for_good


def branches_of(pipe: Any, name: str = "transformer") -> list[Any]:
    """What each branch of this thread's runs keeps."""
    (graphs,) = {block._compiled_call_impl.graphs for block in getattr(pipe, name).blocks}
    runs = [of_run for runs in graphs.kept._thread.runs.values() for of_run in runs.values()]
    return [(of_run, branch) for of_run in runs for branch in of_run.branches.values()]


def test_a_branch_that_has_ended_keeps_nothing(graphs):
    """Guidance that ends within a run, and the first of two transformers."""
    seen: dict[int, list[int]] = {}
    pipe = TINY["wan"].build()

    def unguided_from_5(pipe: Any, step: int, _timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen[step] = [len(branches_of(pipe))]
        pipe._guidance_scale = 1.0 if step == 4 else pipe._guidance_scale
        return given

    with with_graphs(dit_accel.patch(pipe, "mass", density=0.3)):
        TINY["wan"].run(pipe, steps=10, callback_on_step_end=unguided_from_5)
        assert seen[4] == [2]
        assert seen[6] == seen[8] == [1]
        assert not branches_of(pipe)
        assert graphs.released == 1

    pipe = TINY["wan2.2"].build()

    def count(pipe: Any, step: int, _timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen[step] = [len(branches_of(pipe, name)) for name in ("transformer", "transformer_2")]
        return given

    with with_graphs(dit_accel.patch(pipe, "mass", density=0.3)):
        TINY["wan2.2"].run(pipe, steps=16, callback_on_step_end=count)
        last = max(step for step, (first, _) in seen.items() if first)
        assert seen[last] == [2, 2]
        assert seen[last - 1] == [2, 0]
        assert seen[last + 1] == [0, 2]
        assert not branches_of(pipe) + branches_of(pipe, "transformer_2")
        assert graphs.released == 3


def test_graphs_that_are_captured_anew_leave_no_memory_behind(graphs):
    held: list[int] = []
    pipe = TINY["wan"].build()

    def count(pipe: Any, _step: int, _timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        slots = {id(of_run.slots): of_run.slots for of_run, _ in branches_of(pipe)}
        held.append(sum(made() is not None for one in slots.values() for _, made in one._made_for))
        return given

    recipe = dit_accel.presets.resolve("mass").with_fields({"schedule.refresh_every": 4, "schedule.refresh_at": ()})
    with with_graphs(dit_accel.patch(pipe, recipe)):
        TINY["wan"].run(pipe, steps=26, callback_on_step_end=count)
    assert graphs.captured >= 16
    assert max(held) == max(held[:10]) > 0


def test_each_stream_has_a_recorder_of_its_own(graphs, monkeypatch):
    """Graphs share the memory of a recorder, and those of two streams may run at once."""
    pipe = TINY["wan"].build()
    asked: list[Any] = []
    with with_graphs(dit_accel.patch(pipe, "mass", density=0.3)):
        (captured,) = {block._compiled_call_impl.graphs for block in pipe.transformer.blocks}
        make = captured.kept._recorder_of
        captured.kept._recorder_of = lambda device: (asked.append(device), make(device))[1]
        for stream in (1, 1, 2):
            monkeypatch.setattr(kept, "_stream_of", lambda _device, stream=stream: stream)
            TINY["wan"].run(pipe, steps=STEPS)
        assert len(asked) == 2
        assert [stream for _, stream in captured.kept._thread.recorders] == [2]  # the other's memory waits for nobody


def test_counts_begin_anew_between_two_replays(graphs):
    def counted(graphs_too: bool) -> dict[str, Any]:
        pipe = TINY["wan"].build()
        with dit_accel.patch(pipe, "mass", density=0.3) as handle:
            if graphs_too:
                with_graphs(handle)

            def at_step(_pipe: Any, step: int, _timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
                if step == 6:
                    handle.reset()
                return given

            TINY["wan"].run(pipe, steps=10, callback_on_step_end=at_step)
            return facts(handle)

    wanted = counted(False)
    assert wanted["backends"]
    assert counted(True) == wanted
    assert graphs.replayed


def test_a_forward_with_gradients_is_not_captured(graphs):
    pipe = TINY["wan"].build()
    model = pipe.transformer
    with with_graphs(dit_accel.patch(pipe, "mass", density=0.3)):
        given = {
            "hidden_states": torch.randn(1, 16, 3, 12, 14, requires_grad=True),
            "encoder_hidden_states": torch.randn(1, 8, 32),
            "timestep": torch.tensor([500]),
        }
        for _ in range(4):
            model(**given).sample.sum().backward()
    assert not graphs.captured
    assert given["hidden_states"].grad.abs().sum() > 0


class HalfOfAttention(TorchFunctionMode):
    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        return out * 0.5 if func is torch.nn.functional.scaled_dot_product_attention else out


@contextmanager
def hook_of_all_modules(seen: list[str]) -> Iterator[None]:
    hook = register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    yield
    hook.remove()


@pytest.mark.parametrize("kind", ["a function mode", "a dispatch mode", "a hook of all modules"])
def test_those_who_watch_what_runs_see_all_of_it(kind, graphs):
    def clip(graphs_too: bool) -> tuple[torch.Tensor, Any]:
        hooked: list[str] = []
        flops = FlopCounterMode(display=False)
        modes = {"a function mode": HalfOfAttention(), "a dispatch mode": flops}
        watch: Any = modes.get(kind, hook_of_all_modules(hooked))
        pipe = TINY["wan"].build()

        def at_step(pipe: Any, step: int, _timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            if step == 4:
                watch.__enter__()
            if step == 6:
                watch.__exit__(None, None, None)
            return given

        with dit_accel.patch(pipe, "mass", density=0.3) as handle:
            if graphs_too:
                with_graphs(handle)
            found = TINY["wan"].run(pipe, steps=10, callback_on_step_end=at_step)
            if graphs_too:
                (note,) = notes(handle)
                assert note.endswith("hooks of all modules, and modes of torch, would see nothing of a replay.")
        return found, (flops.get_total_flops(), hooked)

    wanted, watched = clip(False)
    found, also = clip(True)
    assert found.equal(wanted)
    assert also == watched
    assert graphs.replayed


@pytest.mark.parametrize(
    ("context", "why"),
    [
        (torch.inference_mode, "tensors of torch.inference_mode do not count their changes: use torch.no_grad"),
        (lambda: torch.autocast("cpu", torch.bfloat16), "autocast keeps casts of weights that a replay would not "),
    ],
    ids=["inference mode", "autocast"],
)
def test_a_run_without_graphs_says_why(context, why, graphs):
    pipe = TINY["wan"].build()
    with with_graphs(dit_accel.patch(pipe, "mass", density=0.3)) as handle:
        with context():
            TINY["wan"].run(pipe, steps=STEPS)
        (note,) = notes(handle)
        assert note.startswith(f"Blocks run without CUDA graphs: {why}")
        assert not graphs.captured
        handle.reset()
        TINY["wan"].run(pipe, steps=STEPS)
        assert not notes(handle)
    assert graphs.replayed


def test_nans_of_replayed_calls_are_counted(graphs):
    pipe = TINY["wan"].build()

    def spoil(pipe: Any, step: int, _timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        return {"latents": given["latents"] * float("nan")} if step == STEPS - 3 else given

    def count(graphs_too: bool) -> int:
        with dit_accel.patch(pipe, "mass", density=0.3) as handle:
            if graphs_too:
                with_graphs(handle)
            TINY["wan"].run(pipe, steps=STEPS, callback_on_step_end=spoil)
            found = handle.summary().nan_calls
            handle.reset()
            assert not handle.summary().nan_calls
            return found

    assert count(True) == count(False) > 0
    assert graphs.replayed


def test_blocks_are_given_back(graphs):
    pipe = TINY["wan"].build()
    blocks = list(pipe.transformer.blocks)
    before = [block._compiled_call_impl for block in blocks]
    handle = with_graphs(dit_accel.patch(pipe, "mass", density=0.3))
    assert all(block._compiled_call_impl is not None for block in blocks)
    other = copy.deepcopy(pipe.transformer)
    assert all(block._compiled_call_impl is None for block in other.blocks)
    pickle.loads(pickle.dumps(pipe.transformer))
    handle.remove()
    assert [block._compiled_call_impl for block in blocks] == before


def test_code_that_was_compiled_later_stays():
    pipe = TINY["wan"].build()
    handle = with_graphs(dit_accel.patch(pipe, "mass", density=0.3))
    compiled = [lambda *_: None for _ in pipe.transformer.blocks]
    for block, code in zip(pipe.transformer.blocks, compiled, strict=True):
        block._compiled_call_impl = code
    handle.remove()
    assert [block._compiled_call_impl for block in pipe.transformer.blocks] == compiled


def test_blocks_that_were_compiled_later_are_said_to_run_without_graphs(graphs):
    pipe = TINY["wan"].build()
    with with_graphs(dit_accel.patch(pipe, "mass", density=0.3)) as handle:
        TINY["wan"].run(pipe, steps=STEPS)
        assert not notes(handle)
        pipe.transformer.blocks[1]._compiled_call_impl = None
        TINY["wan"].run(pipe, steps=STEPS)
        assert notes(handle) == [f"Blocks run without CUDA graphs: {REPLACED}."]
        pipe.transformer.blocks[1] = copy.deepcopy(pipe.transformer.blocks[1])
        gc.collect()
        handle.reset()
        TINY["wan"].run(pipe, steps=STEPS)
        assert notes(handle) == [f"Blocks run without CUDA graphs: {REPLACED}."]


def test_a_cpu_has_no_graphs_and_says_so():
    pipe = TINY["wan"].build()
    with accelerate(pipe, "mass", density=0.3, graphs=True) as handle:
        TINY["wan"].run(pipe, steps=STEPS)
        assert notes(handle) == ["Blocks run without CUDA graphs: a block is given a tensor on cpu."]
        assert "replayed as CUDA graphs" in "\n".join(handle.summary().changes)


def test_a_summary_says_what_was_replayed(graphs):
    pipe = TINY["wan"].build()
    with dit_accel.patch(pipe, "mass", density=0.3) as handle:
        change_beside_attention(handle, graphs=True)
        TINY["wan"].run(pipe, steps=STEPS)
        summary = handle.summary()
        assert f"replayed as CUDA graphs: {summary.replayed_calls} sparse calls" in str(summary)
        assert 0 < summary.replayed_calls < summary.sparse_calls


def test_arguments_are_taken_apart_and_put_together():
    one, two = torch.zeros(2, 3), torch.ones(4)
    value = ((one, [two, None, "name", one]), {"a": {"b": 1.5}, "c": two})
    tensors, form = taken_apart(value)
    assert tensors == [one, two]
    assert put_together(form, tensors) == value
    other = ((torch.ones(2, 3), [two, None, "name", one]), {"a": {"b": 1.5}, "c": two})
    assert taken_apart(other)[1] != form  # two tensors where there was one
    for changed in (1.25, None, "b"):
        assert taken_apart((value[0], {"a": {"b": changed}, "c": two}))[1] != form
    for unlike in (torch.zeros(3, 2), torch.zeros(2, 3).double(), torch.zeros(3, 2).T):
        assert taken_apart([unlike])[1] != taken_apart([one])[1]
    with pytest.raises(CannotCapture, match="a set is among"):
        taken_apart([{1}])
    for lazy in (torch.ones(2, dtype=torch.complex64).conj(), torch.ones(2, dtype=torch.complex64).conj().imag):
        with pytest.raises(CannotCapture, match="only when it is read"):
            taken_apart([lazy])


def test_two_tensors_in_one_place_are_read_from_two():
    """They may be others in a later call."""
    slots = Slots()
    like = torch.zeros(4, 6)
    result = slots.for_result(like, like.device, [])
    one, same = result.shown(), result.shown()
    first = slots.of_given(one, [])
    assert first is result
    second = slots.of_given(same, [first])
    assert second is not first
    assert slots.of_given(same, [first, second]) is second


def test_a_place_is_free_when_no_view_of_it_is_left():
    slots = Slots()
    like = torch.zeros(4, 6)
    first = slots.for_result(like, like.device, [])
    assert slots.for_result(like, like.device, []) is first
    view = first.shown()[1:, ::2]
    assert not first.is_free
    second = slots.for_result(like, like.device, [])
    assert second is not first
    del view
    assert first.is_free
    assert slots.for_result(like, like.device, [first]) is second
    assert slots.for_result(like.double(), like.device, []) not in (first, second)


def test_a_tensor_is_copied_once_until_it_changes():
    slots, given = Slots(), torch.arange(6.0).expand(4, 6)
    slot = slots.of_given(given, [])
    assert slots.of_given(given, []) is slot
    slot.fill(given)
    assert slot.tensor.equal(given)
    assert slot.tensor.stride() == given.stride()
    slot._filled.zero_()
    slot.fill(given)
    assert not slot.tensor.any()  # it was not copied again
    slot.fill(torch.arange(6.0).mul(3).expand(4, 6))  # of the same version, and another
    assert slot.tensor.equal(torch.arange(6.0).mul(3).expand(4, 6))
    other = given.clone().mul_(2)[:, :6]
    slot.fill(other)
    assert slot.tensor.equal(torch.arange(6.0).mul(2).expand(4, 6))
    other.add_(1)
    slot.fill(other)
    assert slot.tensor.equal(torch.arange(6.0).mul(2).add(1).expand(4, 6))
