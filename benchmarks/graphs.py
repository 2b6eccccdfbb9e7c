"""A run with its blocks replayed as CUDA graphs and one without, in turns: seconds, and whether the bits are the same.

    python -m benchmarks.graphs --model embedded-long --recipes auto balanced fast max [--json graphs.json]

Blocks are compiled. Steps are timed, without decoding. A short run goes before each timed one, under the same patch,
since patching discards compiled code. Needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import dit_accel
from dit_accel.acceleration.api import change_beside_attention
from dit_accel.acceleration.compiled import compile_blocks
from dit_accel.cli.environment import environment
from dit_accel.pipelines import load

PROMPT, WARM_UP_STEPS = "a red dragon flying right over a meadow", 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded-long")
    parser.add_argument("--recipes", nargs="+", default=["auto", "balanced", "fast", "max"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=4, help="turns, of which the first is not counted")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda")
    pipe = load(args.model, device=device)
    pipe.set_progress_bar_config(disable=True)
    compile_blocks(pipe)
    sides = [(recipe, graphs) for recipe in args.recipes for graphs in (False, True)]
    turns = [{side: timed(pipe, *side, args.steps) for side in sides} for _ in range(args.repeats)]
    rows = []
    for recipe, graphs in sides:
        seconds = [turn[recipe, graphs]["seconds"] for turn in turns[1:]]
        last = turns[-1][recipe, graphs]
        same = bool(last["latents"].equal(turns[-1][recipe, False]["latents"]))
        facts = {name: last[name] for name in ("replayed_calls", "peak_gib")}
        rows.append({"recipe": recipe, "graphs": graphs, "seconds": seconds, "same_bits": same, **facts})
        print(f"{recipe:10} graphs {graphs!s:5} {statistics.median(seconds):.3f} s, same bits {same}, {facts}")
    if args.json is not None:
        args.json.write_text(json.dumps({**environment(device), "steps": args.steps, "rows": rows}, indent=1) + "\n")


def timed(pipe: Any, recipe: str, graphs: bool, steps: int) -> dict[str, Any]:
    """One run under a patch of its own."""

    def run(steps: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(7)
        made: torch.Tensor = pipe(
            prompt=PROMPT, num_inference_steps=steps, generator=generator, output_type="latent"
        ).frames
        torch.cuda.synchronize()
        return made

    with dit_accel.patch(pipe, None if recipe == "auto" else recipe) as handle:
        change_beside_attention(handle, graphs=graphs)
        run(WARM_UP_STEPS)
        handle.reset()
        torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        latents = run(steps)
        seconds = time.perf_counter() - begin
        return {
            "latents": latents,
            "seconds": seconds,
            "replayed_calls": handle.summary().replayed_calls,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        }


if __name__ == "__main__":
    main()
