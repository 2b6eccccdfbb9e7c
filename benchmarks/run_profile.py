"""Where the GPU's time of a whole run goes: kernels by name, and what the GPU waits for. Dense and patched.

    python -m benchmarks.run_profile --model embedded-long --compile --recipes dense default fast

After two runs three are measured as :mod:`benchmarks.gpu_idle` measures forwards. Latents are not decoded. `default` is
what ``patch(pipe)`` does.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path

import torch

from dit_accel import patch
from dit_accel.acceleration.compiled import compile_blocks
from dit_accel.cli.environment import environment
from dit_accel.cli.settings import Asked
from dit_accel.pipelines import load
from dit_accel.pipelines.builtin import builtins
from dit_accel.pipelines.generate import call_arguments

from .gpu_idle import measured


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
            one = rows[recipe] = measured(run, 3)
        print(f"{recipe}: {one['wall_ms']:.0f} ms, busy {one['busy_ms']:.0f}, {one['kernels']} kernels", flush=True)
        for name, took in one["longest_ms"].items():
            print(f"  {took:8.1f} ms  {name}")
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, **environment(device)}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
