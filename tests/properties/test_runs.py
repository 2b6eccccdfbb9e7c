"""No history of a patched pipeline changes what a call gives: it is what a fresh pipeline, freshly patched, gives.

``DIT_ACCEL_RUNS=300 pytest tests/properties/test_runs.py`` looks for longer.
"""

from __future__ import annotations

import copy
import os
import threading
from collections import Counter
from contextlib import suppress
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import apply_group_offloading
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import dit_accel
from tests.peaked import RECIPES, REUSES, recipe_of
from tests.pipe_calls import (
    SCHEDULERS,
    SIZES,
    VIDEO,
    Call,
    add_lora,
    another,
    bare,
    build,
    by_hand,
    expected,
    has_video,
    perform,
)

EXAMPLES = int(os.environ.get("DIT_ACCEL_RUNS", "40"))
FAMILIES = os.environ.get("DIT_ACCEL_FAMILIES", ",".join(SIZES)).split(",")
CALLS = st.builds(
    Call,
    steps=st.integers(1, 6),
    size=st.integers(0, 2),
    guided=st.booleans(),
    seed=st.integers(0, 1),
)
# Half of them reuse nothing.
NAMES = st.builds(
    "{}+{}".format, st.sampled_from(sorted(RECIPES)), st.one_of(st.just("none"), st.sampled_from(sorted(REUSES)))
)


class StopRun(Exception):
    """What a user's code raises in the middle of a run."""


def raise_stop() -> None:
    raise StopRun


class Runs(RuleBasedStateMachine):
    """One patched pipeline in the hands of a user who does whatever pipelines allow."""

    @initialize(family=st.sampled_from(FAMILIES), recipe=NAMES)
    def begin(self, family: str, recipe: str) -> None:
        self.family = family
        self.recipe = recipe = self._allowed(recipe)
        self.pipe = build(family)
        self.scheduler: str | None = None
        self.lora = False
        self.offloaded = False
        # Forwards outside any run since the last one, which share what they keep.
        self.bare_seeds: list[tuple[int, int]] = []
        self.handle = dit_accel.patch(self.pipe, recipe_of(recipe))
        self.attended: Counter[str] = Counter()
        self._count_calls()

    def _count_calls(self) -> None:
        """Count the calls of every self-attention by other means than the patch's."""
        lock = threading.Lock()

        def count(name: str) -> None:
            with lock:
                self.attended[name] += 1

        self.counters = []
        for layer in self.handle.summary().layers:
            hook = lambda module, args, output, name=layer.name: count(name)  # noqa: E731
            self.counters.append(self._attention(layer.name).register_forward_hook(hook))

    def _attention(self, name: str) -> Any:
        """The module of a layer of the summary."""
        if len(self.handle.sessions) == 1:
            return self.pipe.transformer.get_submodule(name)
        transformer, _, path = name.partition(".")
        return getattr(self.pipe, transformer).get_submodule(path)

    def _check(self, found: torch.Tensor, call: Call, recipe: str | None = "") -> None:
        wanted = expected(self.family, self.recipe if recipe == "" else recipe, self.scheduler, self.lora, call)
        assert torch.equal(found, wanted), f"{call} differs by {float((found - wanted).norm() / wanted.norm()):.4f}"

    def _check_records(self) -> None:
        for layer in self.handle.summary().layers:
            assert layer.sparse_calls + sum(layer.dense_calls.values()) == self.attended[layer.name], layer

    def _run(self, call: Call, runner: Any = None, **more: Any) -> None:
        self.bare_seeds.clear()
        self._check(perform(runner or self.pipe, self.family, call, **more), call)
        self._check_records()

    @rule(call=CALLS)
    def run(self, call: Call) -> None:
        self._run(call)

    @rule(call=CALLS)
    def run_from_another_thread(self, call: Call) -> None:
        found: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: found.append(perform(self.pipe, self.family, call)))
        thread.start()
        thread.join()
        self._check(found[0], call)
        self._check_records()

    @precondition(lambda self: has_video(self.family, self.scheduler))
    @rule(call=CALLS, strength=st.sampled_from([0.3, 0.7, 1.0]), shared=st.booleans())
    def run_video_to_video(self, call: Call, strength: float, shared: bool) -> None:
        call = Call(max(call.steps, 2), call.size, call.guided, call.seed, strength)
        self._run(call, another(self.pipe, VIDEO[self.family], self.pipe.scheduler if shared else None))

    @rule(call=CALLS, shared=st.booleans())
    def run_another_pipeline(self, call: Call, shared: bool) -> None:
        self._run(call, another(self.pipe, scheduler=self.pipe.scheduler if shared else None))

    @rule(outer=CALLS, inner=CALLS, at=st.integers(0, 4))
    def run_inside_a_run(self, outer: Call, inner: Call, at: int) -> None:
        runner, found = another(self.pipe), []

        def callback(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            if step == at:
                found.append(perform(runner, self.family, inner))
            return values

        self._run(outer, callback_on_step_end=callback)
        for one in found:
            self._check(one, inner)

    @precondition(lambda self: not self.offloaded)
    @rule(first=CALLS, second=CALLS)
    def run_two_at_once(self, first: Call, second: Call) -> None:
        calls, found = (first, second), {}
        runners = [another(self.pipe) for _ in calls]
        for runner in runners:
            runner.vae = copy.deepcopy(runner.vae)  # some keep what they are encoding

        def target(index: int) -> None:
            found[index] = perform(runners[index], self.family, calls[index])

        threads = [threading.Thread(target=target, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index, call in enumerate(calls):
            self._check(found[index], call)
        self._check_records()

    @rule(call=CALLS, at=st.integers(0, 4), raises=st.booleans())
    def interrupt(self, call: Call, at: int, raises: bool) -> None:
        def stop(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            if step == at and raises:
                raise StopRun
            pipe._interrupt = step >= at
            return values

        self.bare_seeds.clear()
        with suppress(StopRun):
            perform(self.pipe, self.family, call, callback_on_step_end=stop)
        self._check_records()

    @rule(call=CALLS, layer=st.integers(0, 3), after=st.integers(1, 6), late=st.booleans())
    def fail_inside_a_forward(self, call: Call, layer: int, after: int, late: bool) -> None:
        layers = self.handle.summary().layers
        name = layers[layer % len(layers)].name
        attention = self._attention(name)
        left = iter(range(after))

        def fail(module: Any, args: Any) -> None:
            if next(left, None) is None:
                raise StopRun

        # Before the attention call, or behind it.
        late = late and getattr(attention, "to_out", None) is not None
        part = attention.to_out[0] if late else attention.norm_q
        hook = part.register_forward_pre_hook(fail)
        self.bare_seeds.clear()
        try:
            perform(self.pipe, self.family, call)
        except StopRun:
            # It attended, and did not come to its end.
            self.attended[name] += late
        finally:
            hook.remove()
        self._check_records()

    @rule(data=st.data())
    def set_scheduler(self, data: st.DataObject) -> None:
        self.scheduler = data.draw(st.sampled_from(sorted(SCHEDULERS[self.family])))
        self.pipe.scheduler = SCHEDULERS[self.family][self.scheduler]()

    @rule(size=st.integers(0, 2), seed=st.integers(0, 1))
    def call_the_transformer(self, size: int, seed: int) -> None:
        self.bare_seeds.append((size, seed))
        found = bare(self.pipe.transformer, self.family, size, seed)
        fresh = build(self.family, lora=self.lora)
        dit_accel.patch(fresh, recipe_of(self.recipe))
        for size_before, seed_before in self.bare_seeds:
            wanted = bare(fresh.transformer, self.family, size_before, seed_before)
        assert torch.equal(found, wanted)
        self._check_records()

    @rule(call=CALLS)
    def fail_before_the_first_forward(self, call: Call) -> None:
        hook = self.pipe.transformer.register_forward_pre_hook(lambda module, args: raise_stop(), prepend=True)
        with suppress(StopRun):
            perform(self.pipe, self.family, call)
        hook.remove()

    # Its scheduler shows no progress, and nobody else does.
    @precondition(lambda self: self.family != "cogvideox")
    @rule(steps=st.integers(1, 5), size=st.integers(0, 2), seed=st.integers(0, 1))
    def loop_by_hand(self, steps: int, size: int, seed: int) -> None:
        self.bare_seeds.clear()
        found = by_hand(self.pipe, self.family, steps, size, seed)
        fresh = build(self.family, self.scheduler, self.lora)
        dit_accel.patch(fresh, recipe_of(self.recipe))
        assert torch.equal(found, by_hand(fresh, self.family, steps, size, seed))
        self._check_records()

    @rule()
    def load_or_unload_lora(self) -> None:
        if self.lora:
            self.pipe.transformer.unload_lora()
        else:
            add_lora(self.pipe)
        self.lora = not self.lora

    @precondition(lambda self: not self.offloaded)
    @rule()
    def wrap_forward_as_offloading_does(self) -> None:
        model = self.pipe.transformer
        if hasattr(model, "_hf_hook"):
            remove_hook_from_module(model)
        else:
            add_hook_to_module(model, ModelHook())

    @precondition(lambda self: not self.offloaded)
    @rule()
    def offload_groups(self) -> None:
        cpu = torch.device("cpu")
        apply_group_offloading(self.pipe.transformer, cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
        self.offloaded = True

    def _allowed(self, recipe: str) -> str:
        """The recipe, with a reuse that the family's blocks allow: the last of SD3's return nothing of the prompt, and
        VACE changes the latents between them."""
        name, _, reuse = recipe.partition("+")
        if self.family == "wan-vace":
            return f"{name}+none"
        return f"{name}+listed" if self.family == "sd3" and reuse in ("first_block", "forecast", "energy") else recipe

    @rule(recipe=NAMES)
    def patch_with_another_recipe(self, recipe: str) -> None:
        recipe = self._allowed(recipe)
        self.handle.remove()
        for counter in self.counters:
            counter.remove()
        self.recipe = recipe
        self.handle = dit_accel.patch(self.pipe, recipe_of(recipe))
        self.bare_seeds.clear()
        self.attended.clear()
        self._count_calls()

    def teardown(self) -> None:
        if hasattr(self, "handle"):
            self.handle.remove()
            call = Call(2)
            self._check(perform(self.pipe, self.family, call), call, recipe=None)


@pytest.fixture
def one_thread():
    """Two threads at once split no sum otherwise than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.timeout(0 if EXAMPLES > 40 else 600)
def test_a_run_is_what_a_fresh_pipeline_gives(one_thread):
    longer = EXAMPLES > 40
    run_state_machine_as_test(
        Runs,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=12 if longer else 8,
            derandomize=not longer,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate,) if longer else tuple(Phase),
        ),
    )
