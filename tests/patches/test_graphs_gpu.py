"""Blocks that are replayed as CUDA graphs, on a GPU: the same results, and memory that is given back."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

import dit_accel
from dit_accel.acceleration.compiled import compile_blocks
from dit_accel.patches.graphs.install import install_graphs
from tests.patches.graphed import learn_something
from tests.tiny import TINY

pytestmark = pytest.mark.gpu

KINDS = ("wan", "wan2.2", "wan-vace", "ltx", "flux", "cogvideox")


def on_gpu(name: str) -> Any:
    pipe = TINY[name].build().to("cuda")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(name: str, pipe: Any, steps: int, **changes: Any) -> torch.Tensor:
    tiny, generator = TINY[name], torch.Generator().manual_seed(0)
    given = {
        key: value.to("cuda") if isinstance(value, torch.Tensor) else value
        for key, value in tiny.call(generator).items()
    }
    settings = {"num_inference_steps": steps, "generator": generator, "output_type": "latent"}
    return getattr(pipe(**given | settings | changes), tiny.output)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", KINDS)
def test_the_same_result_as_without_graphs(name, compiled):
    pipe = on_gpu(name)
    undo = compile_blocks(pipe) if compiled else lambda: None
    with dit_accel.patch(pipe, "mass", density=0.3) as handle:
        wanted = run(name, pipe, steps=8)
        calls = handle.summary().sparse_calls
        handle.reset()
        handle.record_change(install_graphs(handle), "graphs")
        for _ in range(2):
            assert run(name, pipe, steps=8).equal(wanted)
        summary = handle.summary()
    assert summary.sparse_calls == 2 * calls
    assert summary.replayed_calls > calls / 2
    assert summary.nan_calls == 0
    assert not any("CUDA graphs" in note for note in summary.notes), summary.notes
    undo()


OF_THE_LAYOUT = ("window", "dina", "gna", "sta", "clear", "radial", "patterns", "masformer", "agent", "sage")
OF_EVERY_STEP = ("pooled", "sparge", "sparge2", "ssa", "sla", "seer")


@pytest.mark.parametrize("recipe", ["balanced", "fast", "max", *OF_THE_LAYOUT, *OF_EVERY_STEP])
def test_the_same_result_and_counts_under_a_recipe(recipe):
    pipe = on_gpu("wan")
    # Its first two layers are dense: all that this model has.
    changes = {"full_layers": (0,)} if recipe == "masformer" else {}
    with dit_accel.patch(pipe, recipe, **changes) as handle:
        learn_something(pipe)
        wanted = run("wan", pipe, steps=20)
        counted = handle.summary()
        handle.reset()
        handle.record_change(install_graphs(handle), "graphs")
        assert run("wan", pipe, steps=20).equal(wanted)
        summary = handle.summary()
    assert (summary.sparse_calls, summary.density) == (counted.sparse_calls, pytest.approx(counted.density))
    assert summary.replayed_calls
    assert not any("CUDA graphs" in note for note in summary.notes), summary.notes


@pytest.mark.parametrize("recipe", ["paro", "mass"])
def test_plans_of_a_calibration(recipe, tmp_path):
    pipe = on_gpu("wan")
    given = TINY["wan"].call(torch.Generator().manual_seed(0))
    given = {key: value.to("cuda") if isinstance(value, torch.Tensor) else value for key, value in given.items()}
    given.pop("generator", None)
    settings = {"buckets": 3, "generate_kwargs": {"num_inference_steps": 5}}
    dit_accel.calibrate(pipe, [given], recipe, out=tmp_path / "plans", **settings)
    with dit_accel.patch(pipe, recipe, calibration=tmp_path / "plans") as handle:
        wanted = run("wan", pipe, steps=20)
        handle.record_change(install_graphs(handle), "graphs")
        assert run("wan", pipe, steps=20).equal(wanted)
        assert handle.summary().replayed_calls


def test_nans_of_replayed_calls_are_counted():
    pipe = on_gpu("wan")
    with dit_accel.patch(pipe, "mass", density=0.3) as handle:
        handle.record_change(install_graphs(handle), "graphs")

        def spoil(pipe: Any, step: int, _timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            if step == 5:
                given["latents"] = given["latents"] * float("nan")
            return given

        run("wan", pipe, steps=8, callback_on_step_end=spoil)
        summary = handle.summary()
    assert summary.nan_calls == 2 * sum(1 for _ in summary.layers) * 2  # two steps, two branches


def test_a_run_gives_the_memory_of_its_graphs_back():
    pipe = on_gpu("wan")
    with dit_accel.patch(pipe, "mass", density=0.3) as handle:
        handle.record_change(install_graphs(handle), "graphs")
        held = []
        for _ in range(4):
            run("wan", pipe, steps=8)
            gc.collect()
            torch.cuda.empty_cache()
            held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert held[-1][1] == held[1][1], held
    assert held[-1][0] - held[1][0] < 2**16, held  # counts of calls, which are put together now and then


def test_what_waits_for_the_device_is_left_as_it_is():
    pipe = on_gpu("wan")
    block = pipe.transformer.blocks[0]
    inner = block.ffn.forward

    class Waits(type(block.ffn)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return inner(x) + float(x.sum()) * 0

    with dit_accel.patch(pipe, "mass", density=0.3) as handle:
        wanted = run("wan", pipe, steps=8)
        block.ffn.__class__ = Waits
        handle.record_change(install_graphs(handle), "graphs")
        assert run("wan", pipe, steps=8).equal(wanted)
        (note,) = (note for note in handle.summary().notes if "CUDA graphs" in note)
    assert torch.zeros(1, device="cuda").item() == 0
    before = torch.cuda.memory_allocated()
    shared = torch.zeros(2**20, device="cuda")
    shared.record_stream(torch.cuda.Stream())
    del shared
    torch.cuda.synchronize()
    torch.zeros(1, device="cuda")
    assert torch.cuda.memory_allocated() < before + 2**20  # the allocator does not think that a capture goes on
    assert note.startswith("Blocks run without CUDA graphs")
