"""Host time and torch operations of sparse attention calls, with kernels that do nothing. Needs no GPU.

    python -m benchmarks.host_time [--repeats 2000] [--json out.json]

A stand-in for a GPU of compute capability 9.0 takes the launches: all of Triton's work on the host is done but the
driver's own call. The sequence is short, so that torch's operations, here the CPU's, cost little but their dispatch.
Operations that a call dispatches and launches are counted, and the events that time it: what these cost is another
host's, not this one's.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

# First, since it says how Triton is imported.
from .ptx_calls import stand_in

import torch  # isort: skip
from triton.compiler import CompiledKernel  # isort: skip

from dit_accel import presets, timing  # isort: skip
from dit_accel.call import AttentionCall, AttentionInputs  # isort: skip
from dit_accel.engine import Engine  # isort: skip
from dit_accel.layout import StepContext, TokenLayout  # isort: skip
from dit_accel.planner import Planner  # isort: skip
from dit_accel.run import Run  # isort: skip

RECIPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "pooled": ("pooled", {}, {}),
    "pooled, one plan": ("pooled", {"refresh_every": 1_000_000}, {}),
    "mass at every call": ("mass", {}, {"schedule": "schedule"}),
    "mass, one plan, 64 queries": (
        "mass",
        {"block": (64, 64)},
        {"schedule": "schedule", "schedule.refresh_every": 1_000_000},
    ),
    "mass, one plan, means": (
        "mass",
        {"means": True},
        {"schedule": "schedule", "schedule.refresh_every": 1_000_000},
    ),
    "pooled, int8": ("pooled", {}, {"precision": "int8"}),
    "window": ("window", {}, {}),
}
GRID, TEXT, HEADS, DIM = (1, 32, 32), 128, 1, 128
counted = {"launches": 0, "events": 0}
spent = {"planning": 0}


def launch_nothing() -> None:
    """Compiled kernels that count their launches and do nothing."""

    def nothing(*_args: Any) -> None:
        counted["launches"] += 1

    def ready(self: Any) -> None:
        self._run, self.function = nothing, 0

    CompiledKernel._init_handles = ready
    event = timing.Stopwatch.start

    def counting(self: Any, device: torch.device) -> Any:
        counted["events"] += 2
        return event(self, device)

    timing.Stopwatch.start = counting  # type: ignore[method-assign]
    plan = Planner.plan

    def timed(self: Any, *args: Any) -> Any:
        begin = time.perf_counter_ns()
        made = plan(self, *args)
        spent["planning"] += time.perf_counter_ns() - begin
        return made

    Planner.plan = timed  # type: ignore[method-assign]


def calls_of(preset: str, options: dict[str, Any], changes: dict[str, Any]) -> Any:
    """A function that runs one call of a recipe."""
    recipe = presets.resolve(preset, **options).with_fields(changes)
    length = GRID[0] * GRID[1] * GRID[2] + TEXT
    layout = TokenLayout(GRID, TEXT, length)
    engine = Engine(recipe, ["layer"], "triton", 0)
    q, k, v = (torch.randn(1, length, HEADS, DIM, dtype=torch.bfloat16) for _ in range(3))
    run, forwards = Run(), iter(range(1, 1 << 30))
    inputs = AttentionInputs(q, k, v)

    def call() -> None:
        step = StepContext(forward_id=next(forwards))
        engine.attend(AttentionCall.of(0, inputs, layout, step, run), lambda: q)

    return call


def measure(call: Any, repeats: int) -> dict[str, float]:
    """Microseconds of the host, of the fastest call, and what a call dispatches."""
    # The numbers of blocks that no kernel writes: of the first call, whose plan may be kept.
    empty, torch.empty = torch.empty, torch.zeros
    call()
    torch.empty = empty
    for _ in range(20):
        call()
    for name in counted:
        counted[name] = 0
    call()
    found: dict[str, float] = dict(counted)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    operations = [event.name for event in profile.events() if event.cpu_parent is None and event.name[:6] == "aten::"]
    found["operations"] = len(operations)
    whole, planning = [], []
    for _ in range(repeats):
        spent["planning"] = 0
        begin = time.perf_counter_ns()
        call()
        whole.append(time.perf_counter_ns() - begin)
        planning.append(spent["planning"])
    # Other programs slow the processor down, and nothing makes it faster.
    for name, times in (("us", whole), ("planning us", planning)):
        found[name] = round(min(times) / 1000, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--json", type=Path, help="where the figures go")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    stand_in(90)
    launch_nothing()
    rows = {}
    with torch.no_grad():
        for name, recipe in RECIPES.items():
            rows[name] = measure(calls_of(*recipe), asked.repeats)
            print(f"{name:32s} {rows[name]}", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
