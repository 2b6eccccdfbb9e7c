"""Host time of a transformer's forward, dense and patched, whose compiled blocks compute nothing. Needs no GPU.

    python -m benchmarks.host_forward --recipe mass [--layers 8] [--steps 30] [--json out.json]

Blocks are compiled by a stand-in that runs a graph once, and from then on only the package's operators in it, with the
tensors of that time. A stand-in for a GPU of compute capability 9.0 takes the launches of sparse calls, so that all of
the host's work is done but the driver's own and that of the graph's other kernels; dense calls are the CPU's own, and
say nothing. Milliseconds of one thread, each forward's least of the runs, are medians over the forwards of a kind.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# First, since it says how Triton is imported.
from .ptx_calls import stand_in

import torch  # isort: skip
from diffusers import WanTransformer3DModel  # isort: skip
from triton.compiler import CompiledKernel  # isort: skip

import dit_accel  # isort: skip
from dit_accel.acceleration.compiled import compile_blocks  # isort: skip
from dit_accel.kernels.mask.packed import PackedBlockMask  # isort: skip

SIZE = {"num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 1024, "text_dim": 128}


def hollow(graph: torch.fx.GraphModule, _examples: Any) -> Callable[..., Any]:
    """A compiler: what it makes computes nothing but the package's operators."""
    given = [node for node in graph.graph.nodes if node.op == "placeholder"]
    operators = [node for node in graph.graph.nodes if str(node.target).startswith("dit_accel.")]
    known: dict[str, Any] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> Any:
            known["values"][node] = result = super().run_node(node)
            return result

    def argument(node: Any) -> Any:
        """A place among what the graph is given, for the numbers of a layer; else what it was the first time."""
        value = torch.fx.node.map_arg(node, known["values"].__getitem__)
        is_layer = isinstance(value, torch.Tensor) and value.dtype == torch.int64 and node in given
        return (given.index(node), None) if is_layer else (None, value)

    def run(*args: Any) -> Any:
        if "out" not in known:
            known["values"] = {}
            known["out"] = Recorder(graph).run(*args)
            known["calls"] = [(node.target, [argument(one) for one in node.args]) for node in operators]
            return known["out"]
        for target, arguments in known["calls"]:
            target(*(value if place is None else args[place] for place, value in arguments))
        return known["out"]

    return run


class Schedule:
    """As much of a scheduler as tells a step."""

    def __init__(self, steps: int) -> None:
        self.step_index: int | None = None
        self.num_inference_steps = steps
        self.timesteps = torch.linspace(1000, 1, steps)
        self.sigmas = torch.linspace(1, 0, steps + 1)


class Pipeline:
    """Denoises nothing, in two branches."""

    do_classifier_free_guidance = True

    def __init__(self, model: Any, steps: int) -> None:
        self.transformer, self.scheduler, self.steps = model, Schedule(steps), steps
        self.milliseconds: list[float] = []

    @property
    def components(self) -> dict[str, Any]:
        return {"transformer": self.transformer, "scheduler": self.scheduler}

    def __call__(self) -> list[float]:
        """Milliseconds of each forward."""
        self.scheduler, took = Schedule(self.steps), []
        latents = torch.randn(1, 16, 1, 16, 32).bfloat16()
        prompts = {name: torch.randn(1, 16, 128).bfloat16() for name in ("cond", "uncond")}
        for index, timestep in enumerate(self.scheduler.timesteps):
            self._current_timestep = timestep
            for name, prompt in prompts.items():
                begin = time.thread_time_ns()
                with self.transformer.cache_context(name):
                    self.transformer(latents, timestep[None], prompt, return_dict=False)
                took.append((time.thread_time_ns() - begin) / 1e6)
            self.scheduler.step_index = index + 1
        return took


def kinds_of(handle: Any, pipe: Pipeline) -> list[str]:
    """What each forward of a run does; traces the blocks."""
    if handle is None:
        pipe()
        return ["unpatched"] * 2 * pipe.steps
    handle.record_steps()
    pipe()
    found = []
    for step in handle.summary().steps:
        kind = "planning" if step.plans_made else "sparse" if step.sparse_calls else "dense"
        # The first branch of a step leads.
        found += [kind] * (2 - step.skipped_forwards) + ["skipped"] * step.skipped_forwards
    handle.record_steps(False)
    return found


def launch_nothing(handle: Any) -> None:
    """From now on kernels are Triton's, and do nothing."""

    def nothing(*_args: Any) -> None: ...

    def ready(self: Any) -> None:
        self._run, self.function = nothing, 0

    CompiledKernel._init_handles = ready
    PackedBlockMask._width = property(lambda _mask: 2)  # which no kernel has counted
    for session in () if handle is None else handle.sessions.values():
        engine = session.engine
        engine.backend = "triton"
        for choices in (engine._choices, engine._allowed, engine._attention_choices):
            choices.clear()
    stand_in(90)


def python_calls(work: Callable[[], object]) -> int:
    """Python functions that are called."""
    calls = 0

    def seen(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(seen)
    work()
    sys.setprofile(None)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="mass", help="a preset, or none for an unpatched model")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where the figures go")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = {"patch_size": (1, 2, 2), "cross_attn_norm": True, "rope_max_seq_len": 64, "num_layers": asked.layers}
    pipe = Pipeline(WanTransformer3DModel(**settings, **SIZE).bfloat16().eval(), asked.steps)
    compile_blocks(pipe, backend=hollow)
    with torch.no_grad():
        handle = None if asked.recipe == "none" else dit_accel.patch(pipe, asked.recipe, backend="torch")
        kinds = kinds_of(handle, pipe)
        launch_nothing(handle)
        pipe()
        least = list(map(min, zip(*(pipe() for _ in range(asked.repeats)), strict=True)))
        calls = python_calls(pipe) / len(kinds)
    found = {
        kind: {"forwards": kinds.count(kind), "ms": round(statistics.median(of_kind), 2)}
        for kind in dict.fromkeys(kinds)
        if (of_kind := [took for took, which in zip(least, kinds, strict=True) if which == kind])
    }
    for kind, figures in found.items():
        print(f"{asked.recipe:10s} {kind:10s} {figures['forwards']:3d} forwards, {figures['ms']:6.2f} ms each")
    print(f"{asked.recipe:10s} {calls:.0f} calls of Python functions a forward, over all kinds")
    if asked.json:
        asked.json.write_text(json.dumps({"kinds": found, "calls": calls}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
