"""How long the GPU waits for the host in a forward, dense and patched: where short sequences lose their gain.

    python -m benchmarks.gpu_idle --arch flux-dev --layers 6 --recipes dense pooled mass [--compile] [--json out.json]

Random weights, one forward after the other. Three times each, medians: `wall`, from the first to the last kernel of a
forward behind an idle GPU; `issue`, until the host has issued it all; `busy`, in which at least one kernel ran, by
torch's profiler. Where `issue` is about `wall` the host is what takes long, and `idle` is what a CUDA graph could save.
With `--graph` each forward is a replay of such a graph, under plans that were made before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dit_accel import patch, presets
from dit_accel.benchmarking.forward import compiled_blocks, dense_attention
from dit_accel.cli.environment import environment
from dit_accel.patches.rotary import TakeAngles
from dit_accel.pipelines.architectures import architecture

from .captured_calls import captured

SHOWN = 12


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of spans (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def kernels_of(profiler: profile) -> list[tuple[str, float, float]]:
    """Name, start and end of everything that ran on the GPU, in milliseconds."""
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return [(event.name, event.time_range.start / 1000, event.time_range.end / 1000) for event in events]


def waits(kernels: Sequence[tuple[str, float, float]]) -> dict[str, float]:
    """Between which kernels nothing ran, and for how long in all, the longest first."""
    found: Counter[str] = Counter()
    last, reached = "", float("inf")
    for name, start, end in sorted(kernels, key=lambda kernel: kernel[1]):
        if start > reached:
            found[f"{last[:44]} -> {name[:44]}"] += start - reached
        if last == "" or end > reached:
            last, reached = name, end
    return dict(found.most_common(SHOWN))


def measured(call: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Milliseconds of one call, which kernels take most of them, and between which the GPU waits."""
    walls, issues = [], []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        started = time.perf_counter()
        begin.record()
        call()
        end.record()
        issues.append(1000 * (time.perf_counter() - started))
        torch.cuda.synchronize()
        walls.append(begin.elapsed_time(end))
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    kernels = kernels_of(profiler)
    busy, wall = covered([span for _, *span in kernels]), statistics.median(walls)
    by_name: Counter[str] = Counter()
    for name, start, end in kernels:
        by_name[name[:90]] += end - start
    return {
        "wall_ms": wall,
        "issue_ms": statistics.median(issues),
        "busy_ms": busy,
        "idle_share": max(0.0, 1 - busy / wall),
        "kernels": len(kernels),
        "longest_ms": dict(by_name.most_common(SHOWN)),
        "waits_ms": waits(kernels),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="flux-dev")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--recipes", nargs="+", default=["dense", "pooled", "mass"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--processors-turn", action="store_true", help="leave the rotary embedding to diffusers")
    parser.add_argument("--graph", action="store_true", help="replay a captured forward, whose plans are kept")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    known, device = architecture(args.arch), torch.device("cuda")
    width, height, frames = known.size
    if args.processors_turn:
        TakeAngles.devices = ()
    found = {}
    for recipe in args.recipes:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            model = known.build(dtype=torch.bfloat16, device=device, layers=args.layers)
            size = {"width": width, "height": height, "frames": frames, "batch": 1}
            inputs = known.make_inputs(model, **size, dtype=torch.bfloat16, device=device)
            stack.enter_context(dense_attention(model, "_native_cudnn"))
            if recipe != "dense":
                kept = {"schedule.refresh_every": 1_000_000} if args.graph else {}
                stack.enter_context(patch(model, presets.resolve(recipe).with_fields(kept)))
            if args.compile:
                stack.enter_context(compiled_blocks(model, model, "inductor"))

            def forward(model: Any = model, inputs: Any = inputs) -> Any:
                return model(**inputs)

            for _ in range(4):
                forward()
            found[recipe] = measured(captured(forward).replay if args.graph else forward, args.repeats)
        one = found[recipe]
        print(
            f"{recipe:<12} wall {one['wall_ms']:.2f} ms, issue {one['issue_ms']:.2f}, busy {one['busy_ms']:.2f}, "
            f"idle {one['idle_share']:.0%}, {one['kernels']} kernels",
            flush=True,
        )
    for recipe, one in found.items():
        print(recipe, *(f"  {took:.3f} ms  {name}" for name, took in one["longest_ms"].items()), sep="\n")
    if args.json:
        args.json.write_text(json.dumps({"rows": found, **environment(device)}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
