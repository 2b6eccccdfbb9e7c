"""Where the GPU's time of a whole run goes: kernels by name, and what the GPU waits for. Dense and patched.

    python -m benchmarks.run_profile --model embedded-long --compile --recipes dense default fast

After two runs three are timed, then one is looked at by torch's profiler: `busy`, in which at least one kernel ran, of
`span`, from the first to the last. Latents are not decoded. `default` is what ``patch(pipe)`` does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dit_accel import patch
from dit_accel.acceleration.compiled import compile_blocks
from dit_accel.cli.environment import environment
from dit_accel.cli.settings import Asked
from dit_accel.pipelines import load
from dit_accel.pipelines.builtin import builtins
from dit_accel.pipelines.generate import call_arguments

from .gpu_idle import covered, kernels_of

SHOWN = 12


def profiled(run: Callable[[], Any]) -> dict[str, Any]:
    """Milliseconds of one run, of its longest kernels, and between which kernels the GPU waited longest."""
    walls = []
    for _ in range(3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        walls.append(1000 * (time.perf_counter() - began))
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    kernels = sorted(kernels_of(profiler), key=lambda kernel: kernel[1])
    times: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    waits: Counter[str] = Counter()
    last, reached = kernels[0][0], kernels[0][1]
    for name, start, end in kernels:
        times[name[:90]] += end - start
        numbers[name[:90]] += 1
        if start > reached:
            waits[f"{last[:44]} -> {name[:44]}"] += start - reached
        if end > reached:
            last, reached = name, end
    return {
        "wall_ms": statistics.median(walls),
        "busy_ms": covered([span for _, *span in kernels]),
        "span_ms": reached - kernels[0][1],
        "kernels": len(kernels),
        "longest": {name: [took, numbers[name]] for name, took in times.most_common(SHOWN)},
        "waits": dict(waits.most_common(SHOWN)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded-long")
    parser.add_argument("--recipes", nargs="+", default=["dense", "default", "fast"])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda")
    pipe = load(args.model, dtype=torch.bfloat16, device=device)
    pipe.set_progress_bar_config(disable=True)
    asked = Asked.read(None, None, args.steps, None)
    call = call_arguments(pipe, **asked.settings(pipe, builtins().get(args.model))) | {"output_type": "latent"}
    if args.compile:
        compile_blocks(pipe)
    rows = {}
    for recipe in args.recipes:
        with nullcontext() if recipe == "dense" else patch(pipe, None if recipe == "default" else recipe):

            def run() -> object:
                return pipe("a red car in a forest", **call, generator=torch.Generator().manual_seed(0))

            run()
            run()
            one = rows[recipe] = profiled(run)
        wall, busy, span = (one[f"{name}_ms"] for name in ("wall", "busy", "span"))
        print(f"{recipe}: {wall:.0f} ms, busy {busy:.0f} of {span:.0f}, {one['kernels']} kernels", flush=True)
        for name, (took, number) in one["longest"].items():
            print(f"  {took:8.1f} ms  {number:6d}  {name}")
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, **environment(device)}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
