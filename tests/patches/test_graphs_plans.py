"""Blocks that are replayed as graphs with plans of a layout, of a calibration, or made anew in each replay."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import dit_accel
from dit_accel.call import AttentionCall
from dit_accel.kernels import BlockMask
from dit_accel.plan import LayerMemory
from dit_accel.stages.select.gate import GlobalGate
from dit_accel.stages.select.pooled import Pooled
from dit_accel.stages.select.static import Window
from tests import pipe_calls
from tests.patches.graphed import assert_alike, facts, learn_something, notes, with_graphs
from tests.pipe_calls import Call
from tests.tiny import TINY

STEPS = 7
EVERY_STEP = "this recipe makes a plan at every step"


@pytest.mark.parametrize(
    "recipe", ["window", "dina", "gna", "sta", "clear", "radial", "patterns", "masformer", "agent", "sage"]
)
def test_plans_of_the_layout_serve_every_replay(recipe, graphs):
    assert_alike(dit_accel.presets.resolve(recipe), STEPS)
    assert graphs.replayed > graphs.captured > 0


@pytest.mark.parametrize("recipe", ["pooled", "sparge", "sparge2", "ssa", "sla", "seer"])
def test_plans_of_every_step_are_made_anew_in_a_replay(recipe, graphs):
    # What computes on a CPU otherwise looks at the lists of a plan, as no kernel of a GPU does.
    assert_alike(dit_accel.presets.resolve(recipe), STEPS, backend="reference")
    assert graphs.replayed > graphs.captured > 0


def test_cubes_that_divide_the_grid_are_replayed(graphs):
    size = {"height": 128, "width": 128, "num_frames": 13}
    assert_alike(dit_accel.presets.vsa(), STEPS, size, backend="reference")
    assert graphs.replayed > graphs.captured > 0


def test_replays_keep_as_many_blocks_as_their_own_queries_and_keys_say(graphs):
    recipe = replace(dit_accel.presets.pooled(dense_fraction=0.0), select=GlobalGate(0.6, (32, 32)))
    assert_alike(recipe, STEPS, backend="reference")
    pipe = pipe_calls.build("wan")
    with with_graphs(dit_accel.patch(pipe, recipe, backend="reference")) as handle:
        handle.record_steps()
        pipe_calls.perform(pipe, "wan", Call(STEPS, 0))
        steps = handle.summary().steps
    assert len({step.density for step in steps}) > STEPS // 2
    assert graphs.replayed


@dataclass(frozen=True)
class Remembering(Pooled):
    """Somebody's own: it keeps every second choice for the call after it."""

    def select(self, blocks: Any, tables: Any, call: AttentionCall, memory: LayerMemory | None = None) -> BlockMask:
        assert memory is not None
        if memory.base is None:
            memory.base = torch.stack([call.q.mean(), call.k.mean()])
            return super().select(blocks, tables, call, memory)
        memory.base = None
        return Pooled(0.6, block=self.block).select(blocks, tables, call, memory)


def test_a_selection_that_adds_a_memory_to_one_of_ours_is_not_captured(graphs):
    recipe = replace(dit_accel.presets.pooled(dense_fraction=0.0), select=Remembering(0.3, block=(32, 32)))
    pipe, call = pipe_calls.build("wan"), Call(STEPS, 0)
    with dit_accel.patch(pipe, recipe) as handle:
        wanted = pipe_calls.perform(pipe, "wan", call)
        counted = facts(handle)
    with with_graphs(dit_accel.patch(pipe, recipe)) as handle:
        assert pipe_calls.perform(pipe, "wan", call).equal(wanted)
        assert facts(handle) == counted
        assert notes(handle) == [f"Blocks run without CUDA graphs: {EVERY_STEP}, which may follow from the one before."]
    assert not graphs.captured


@pytest.mark.parametrize("points", [((0.0, 0.2), (0.9, 0.9)), ((0.0, 0.3), (0.5, 0.3), (0.6, 0.8))], ids=str)
def test_a_density_that_changes_with_the_steps_is_captured_anew(points, graphs):
    recipe = dit_accel.presets.pooled(dense_fraction=0.0).with_fields({"schedule.density_points": points})
    recipe = replace(recipe, select=Pooled(0.3, block=(32, 32)))
    assert_alike(recipe, 13, backend="reference")
    assert bool(graphs.replayed) == (len(points) == 3)  # where some steps have the same


@pytest.mark.parametrize("layers", [(0,), (0, 1)])
def test_layers_that_are_always_dense_beside_plans_of_the_layout(layers, graphs):
    assert_alike(dit_accel.presets.resolve("gna").with_fields({"schedule.dense_layers": layers}), STEPS)
    assert graphs.replayed


def test_a_window_of_single_tokens_is_counted_by_the_tokens_that_it_shows(graphs):
    recipe = replace(dit_accel.presets.gna(), select=Window((3, 3, 3), block=(32, 32)))
    pipe = pipe_calls.build("wan")
    with with_graphs(dit_accel.patch(pipe, recipe)) as handle:
        pipe_calls.perform(pipe, "wan", Call(STEPS, 0))
        summary = handle.summary()
    assert summary.replayed_calls
    assert summary.token_density < summary.density
    assert_alike(recipe, STEPS)


@pytest.mark.parametrize("buckets", [1, 3])
@pytest.mark.parametrize("recipe", ["paro", "mass"])
def test_plans_of_a_calibration_are_replayed_as_long_as_they_hold(recipe, buckets, graphs, tmp_path):
    recipe = dit_accel.presets.resolve(recipe).with_fields({"select.density": 0.4, "select.block": (32, 32)})
    height, width = pipe_calls.SIZES["wan"][0]
    given = TINY["wan"].call(torch.Generator().manual_seed(0)) | {"height": height, "width": width}
    given.pop("generator", None)
    path = tmp_path / "plans"
    dit_accel.calibrate(
        pipe_calls.build("wan"), [given], recipe, buckets=buckets, generate_kwargs={"num_inference_steps": 5}, out=path
    )
    assert_alike(recipe, 14, calibration=path)
    assert graphs.replayed > graphs.captured > 0


@pytest.mark.parametrize("recipe", ["gna", "pooled"])
def test_runs_with_other_sizes_beside_another_pipeline(recipe, graphs):
    pipe, other = pipe_calls.build("wan"), pipe_calls.build("wan")
    calls = (Call(6, 0), Call(5, 1), Call(7, 0, guided=False), Call(6, 2), Call(6, 0))
    with dit_accel.patch(pipe, recipe, backend="reference"):
        wanted = [pipe_calls.perform(pipe, "wan", call) for call in calls]
    ours = with_graphs(dit_accel.patch(pipe, recipe, backend="reference"))
    with ours, with_graphs(dit_accel.patch(other, "mass", density=0.3)):
        for call, clip in zip(calls, wanted, strict=True):
            pipe_calls.perform(other, "wan", call)
            assert pipe_calls.perform(pipe, "wan", call).equal(clip)
        assert not notes(ours)
        assert ours.summary().replayed_calls


def test_what_a_recipe_learns_between_two_steps_is_replayed(graphs):
    def clip(graphs_too: bool) -> torch.Tensor:
        pipe = TINY["wan"].build()

        def at_step(pipe: Any, step: int, _timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            if step == 3:
                learn_something(pipe)
            return given

        with dit_accel.patch(pipe, "sla", backend="reference") as handle:
            if graphs_too:
                with_graphs(handle)
            return TINY["wan"].run(pipe, steps=STEPS, callback_on_step_end=at_step)

    wanted = clip(False)
    assert clip(True).equal(wanted)
    assert graphs.replayed


@pytest.mark.parametrize(
    ("recipe", "fields", "why"),
    [
        ("dense", {}, "this recipe leaves all attention to the model"),
        ("carried", {}, "Carried depends on the step"),
        (
            "ear",
            {"schedule": "schedule"},
            f"{EVERY_STEP}, which may follow from the one before",
        ),
        (
            "pooled",
            {"schedule.dense_refresh": True},
            f"{EVERY_STEP}, and such a step is dense",
        ),
        ("pooled", {"order": "sorted"}, f"{EVERY_STEP}, and an order of tokens"),
        (
            "pooled",
            {"select.head_densities": ((0.2, 0.4),)},
            f"{EVERY_STEP}, with densities by head, which the host hands over",
        ),
        ("mass", {"schedule.drift_bound": 0.5}, "this recipe looks at every step whether its plans still hold"),
    ],
)
def test_a_recipe_whose_blocks_never_repeat_says_so(recipe, fields, why, graphs):
    pipe, recipe = TINY["wan"].build(), dit_accel.presets.resolve(recipe).with_fields(fields)
    with dit_accel.patch(pipe, recipe):
        wanted = TINY["wan"].run(pipe, steps=STEPS)
    with with_graphs(dit_accel.patch(pipe, recipe)) as handle:
        assert TINY["wan"].run(pipe, steps=STEPS).equal(wanted)
        assert notes(handle) == [f"Blocks run without CUDA graphs: {why}."]
        handle.reset()
        assert notes(handle) == [f"Blocks run without CUDA graphs: {why}."]
    assert not graphs.captured
