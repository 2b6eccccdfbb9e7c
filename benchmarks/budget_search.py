"""A density per layer and head, found on the embedded model, against one density for all: the Pareto front.

Each head's error is measured on runs of two prompts that the comparison does not use, the budget is shared out
for every mean density, and both kinds of recipe generate the comparison's prompts. Same figures as fidelity.py.

    python benchmarks/budget_search.py --base pooled --out search_pooled.json
    python benchmarks/budget_search.py --base adaspa --out search_adaspa.json
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from fidelity import Sweep, show, write
from fidelity_presets import DENSE, SEARCH, Method

from dit_accel import Recipe, presets
from dit_accel.calibration.allocation import allocate
from dit_accel.calibration.head_errors import PROBE, HeadErrors, measure_heads
from dit_accel.calibration.recording import record_inputs
from dit_accel.calibration.search import with_densities
from dit_accel.pipelines import load
from dit_accel.quality.prompts import DEFAULT_PROMPTS

PROMPTS = ("a blue penguin bouncing over a meadow", "two red robots flying left in space")


def base_recipe(name: str, density: float) -> Recipe:
    """The recipe with one density for all heads."""
    if name == "pooled":
        return presets.pooled(density=density, dense_fraction=DENSE)
    return presets.adaspa(density=density, search_at=(SEARCH,), head_adaptive=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="pooled", choices=["pooled", "adaspa"])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--probe", type=float, default=PROBE, help="density at which heads' effects are measured")
    parser.add_argument("--samples", type=int, nargs="+", default=[2, 5, 8], help="steps of the recorded forwards")
    parser.add_argument("--clips", type=int, default=len(DEFAULT_PROMPTS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--frames", type=int, default=29)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--errors", type=Path, help="a result of this script: take its measured errors")
    parser.add_argument("--measure-only", action="store_true", help="generate no clips")
    parser.add_argument("--out", type=Path, default=Path("budget_search.json"))
    args = parser.parse_args()
    pipe = load("embedded", dtype=getattr(torch, args.dtype), device=args.device)
    pipe.set_progress_bar_config(disable=True)
    sweep = Sweep(pipe, args)
    start = time.perf_counter()
    errors = read(args.errors) if args.errors else measured(sweep, args)
    seconds = time.perf_counter() - start
    print(f"errors of {errors.error.shape[0]} x {errors.error.shape[1]} heads in {seconds:.1f} s", flush=True)
    result: dict[str, Any] = {
        "facts": sweep.facts()
        | {"base": args.base, "prompts_of_the_search": PROMPTS, "samples": args.samples, "probe": args.probe},
        "measure_seconds": seconds,
        "densities": errors.densities,
        "kept": errors.kept.tolist(),
        "errors": errors.error.tolist(),
        "rows": [],
    }
    write(result, args.out, quiet=True)
    if args.measure_only:
        return
    with ThreadPoolExecutor(args.threads) as pool:
        dense = sweep.dense()
        waiting = []
        for density in args.densities:
            uniform = base_recipe(args.base, density)
            flat = [[density] * errors.error.shape[1]] * errors.error.shape[0]
            # Own and rounded-up blocks count: both keep the same number in all.
            found = allocate(errors, mean_density=errors.kept_at(flat))
            searched = with_densities(uniform, found)
            for name, recipe, shares in (("uniform", uniform, flat), ("searched", searched, found)):
                print(f"{name} at {density}: predicted error {errors.predicted(shares):.4f}", flush=True)
                chosen = Method(f"{args.base}-{name}", lambda _, recipe=recipe: recipe)
                waiting.append((errors.predicted(shares), sweep.row(chosen, density, dense, pool)))
        result["rows"] = [row.result() | {"predicted_error": predicted} for predicted, row in waiting]
    write(result, args.out, quiet=True)
    show(result)


def measured(sweep: Sweep, args: argparse.Namespace) -> HeadErrors:
    """Errors on the conditional forwards of the search's prompts at some steps."""
    model = sweep.pipe.transformer
    inputs = record_inputs(
        model,
        lambda: sweep.generate(PROMPTS[: args.clips]),
        # The pipeline runs the transformer twice a step, with the prompt first.
        lambda number: number % 2 == 0 and number // 2 in args.samples,
    )
    return measure_heads(model, base_recipe(args.base, 0.2), inputs, probe=args.probe)


def read(path: Path) -> HeadErrors:
    data = json.loads(path.read_text())
    kept, errors = (torch.tensor(data[name], dtype=torch.float64) for name in ("kept", "errors"))
    return HeadErrors(tuple(data["densities"]), kept, errors)


if __name__ == "__main__":
    main()
