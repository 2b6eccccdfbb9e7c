"""Any selection with any stand-in for what it leaves out, on recorded calls: errors of the output at equal time.

Calls of an embedded model are recorded once (dense runs; prompts and seeds that no table reports) and kept in a folder
that git ignores. Plans of a search are of the recorded step before all others, as the preset ``mass`` makes them; those
of a call's own scores are of the call itself. For each row: relative L2 error of the attention output to dense
attention in float64 (root of the summed squares over calls), the attention mass that is kept, the density, and a time
by ``lab_cost.py``. Errors at equal time are interpolated in the logarithm between densities. ``lab_selections.py`` and
``lab_stands.py`` have the rows; a window of the grid in whole blocks is one more selection, at its own density.

    python benchmarks/laboratory.py --record --prompts 2              # minutes a prompt on a CPU, seconds on a GPU
    python benchmarks/laboratory.py --prompts 2 --out laboratory.json
    python benchmarks/laboratory.py --selections mass pooled --stands nothing mean --layers 2 5
    python benchmarks/laboratory.py --show laboratory.json --at 0.2
    python benchmarks/laboratory.py --model embedded-long --record    # 32,760 tokens: a GPU, or half an hour
    python benchmarks/laboratory.py --model embedded-long --every 16 --selections mass ear pooled --stands nothing mean
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from lab_cost import CostModel
from lab_score import WINDOW, Laboratory, rows_of
from lab_selections import SELECTIONS
from lab_stands import MEMORIES, STANDS
from recorded_calls import Recording, facts_of, read, record
from reuse_front import TUNING_PROMPTS

FIRST_SEED = 1000
DENSITIES = (0.05, 0.1, 0.15, 0.2)


@dataclass(frozen=True)
class Subject:
    """A model whose calls are judged, and at which steps unless the command says others.

    Attributes:
        search: the last step of the dense fifth.
    """

    num_steps: int
    search: int
    later: tuple[int, ...]
    folder: Path


SUBJECTS = {
    "embedded": Subject(30, 5, (8, 12, 18, 24, 29), Path("outputs/laboratory")),
    "embedded-long": Subject(20, 3, (5, 8, 12, 16, 19), Path("outputs/laboratory_long")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="record calls that are not there yet, and stop")
    parser.add_argument("--model", choices=SUBJECTS, default="embedded")
    parser.add_argument("--folder", type=Path, help="of the recorded calls; default: one a model, in outputs/")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--layers", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--search", type=int, help="step of the search; default: the last of the dense fifth")
    parser.add_argument(
        "--steps", type=int, nargs="+", help="later ones; default: all to record, every second to score"
    )
    parser.add_argument("--num-steps", type=int, help="of a run to record; default: the model's")
    parser.add_argument("--guidance", type=float, help="of a run to record; 1 has one branch; default: the model's")
    parser.add_argument("--trajectory", type=float, help="record a run of `mass` at this density, not a dense one")
    parser.add_argument("--branches", nargs="+", default=["cond"], help="cond, uncond, or both")
    parser.add_argument("--tile", type=int, nargs=3, default=[4, 4, 4])
    parser.add_argument("--block", type=int, nargs=2, default=[128, 64])
    parser.add_argument("--every", type=int, default=4, help="score every n-th query block")
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    parser.add_argument("--selections", nargs="+", help="names; default: all")
    parser.add_argument("--stands", nargs="+", help="names of what stands in; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"], help="of the methods' sums")
    parser.add_argument("--at", type=float, default=0.1, help="the table is at the time of mass at this density")
    parser.add_argument("--show", type=Path, help="print the table of a file")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_flush_denormal(True)  # the exponentials of small logits
    if args.show:
        result = json.loads(args.show.read_text())
        show(result, args.at)
        show_steps(result, args.at)
        return
    subject = SUBJECTS[args.model]
    args.folder = args.folder or subject.folder
    args.search = subject.search if args.search is None else args.search
    args.steps = args.steps or list(subject.later if args.record else subject.later[::2])
    numbers = [FIRST_SEED + n for n in range(args.prompts)]
    if args.record:
        wanted = Recording(
            args.model,
            (args.search, *args.steps),
            args.num_steps or subject.num_steps,
            tuple(args.layers),
            args.guidance,
            args.trajectory,
        )
        dtype = torch.bfloat16 if args.device != "cpu" else torch.float32
        record(args.folder, list(zip(numbers, TUNING_PROMPTS)), wanted, args.device, dtype)
        return
    result = measure(args, numbers)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    show(result, args.at)


def measure(args: argparse.Namespace, numbers: list[int]) -> dict[str, Any]:
    """All rows, over all calls that were asked for."""
    begin = time.perf_counter()
    recorded = facts_of(args.folder, numbers[0])
    laboratory = Laboratory(
        selections=[s for s in SELECTIONS if args.selections is None or s.name in args.selections],
        stands=[s for s in (*STANDS, *MEMORIES) if args.stands is None or s.name in args.stands],
        densities=args.densities,
        search_step=args.search,
        num_steps=recorded["num_steps"],
        tile=tuple(args.tile),
        block=tuple(args.block),
        every=args.every,
        device=torch.device(args.device),
        dtype=getattr(torch, args.dtype),
        with_window=args.selections is None or WINDOW in args.selections,
    )
    wanted = {args.search, *args.steps}
    calls = (
        call
        for call in read(args.folder, numbers)
        if call.layer in args.layers and call.branch in args.branches and call.step in wanted
    )

    def progress(scored: int) -> None:
        print(f"{scored} calls, {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)

    sums = laboratory.run(calls, progress)
    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "prompts": [TUNING_PROMPTS[n - FIRST_SEED] for n in numbers],
        "seeds": numbers,
        "calls": len(next(iter(sums.values())).relative),
        "search_step": args.search,
        **recorded,
        **{name: getattr(args, name) for name in ("layers", "steps", "branches", "tile", "block", "every", "dtype")},
        "device": torch.cuda.get_device_name() if args.device != "cpu" else f"CPU ({platform.machine()})",
        "torch": torch.__version__,
        "seconds": time.perf_counter() - begin,
        "cost_model": vars(CostModel.measured()),
    }
    held = [vars(one) for one in laboratory.concentrations]
    return {"facts": facts, "rows": rows_of(laboratory, sums), "density_of_95": held}


def show(result: dict[str, Any], at: float) -> None:
    """At the time that ``mass`` takes at a density: least errors first. Beside it, what each has at that density."""
    curves: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in result["rows"]:
        curves[row["selection"], row["stand"]].append(row)
    fixed = {pair: curve[0] for pair, curve in curves.items() if curve[0]["asked_density"] is None}
    curves = {pair: curve for pair, curve in curves.items() if pair not in fixed}
    if curves:
        plain = curves.get(("mass", "nothing")) or next(iter(curves.values()))
        limit = next(row["milliseconds"] for row in plain if math.isclose(row["asked_density"], at))
        print(f"{result['facts']['calls']} calls; at {limit:.3f} ms, the time of mass alone at {at}; at that density")
        print(
            f"{'selection':<28}{'stands in':<30}{'error':>8}{'density':>8}{'mass':>7}"
            f"{'error':>9}{'density':>8}{'ms':>7}"
        )
        table = []
        for pair, curve in curves.items():
            found = [between(curve, limit, name) for name in ("error", "density", "mass")]
            same = next(row for row in curve if math.isclose(row["asked_density"], at))
            table.append((*pair, *found, same["error"], same["density"], same["milliseconds"]))
        for name, stand, *numbers in sorted(table, key=lambda one: (math.isnan(one[2]), one[2], one[5])):
            cells = zip(numbers, ("8.4f", "8.3f", "7.4f", "9.4f", "8.3f", "7.2f"))
            print(f"{name:<28}{stand:<30}" + "".join(format(number, form) for number, form in cells))
    for (name, stand), row in sorted(fixed.items(), key=lambda one: one[1]["error"]):
        print(f"{name:<28}{stand:<30}{row['error']:>32.4f}{row['density']:>8.3f}{row['milliseconds']:>7.2f}")


def show_steps(result: dict[str, Any], at: float) -> None:
    """At that density, how errors and kept mass go over the steps; and how many blocks hold nearly all mass."""
    for row in result["rows"]:
        if row["asked_density"] is not None and math.isclose(row["asked_density"], at):
            steps = zip(row["mean_error_of_steps"].items(), row["mass_of_steps"].values())
            cells = (f"{step}: {error:.4f}, {mass:.4f}" for (step, error), mass in steps)
            print(f"{row['selection']:<28}{row['stand']:<30}error and mass at steps  " + "   ".join(cells))
    held: dict[int, list[float]] = defaultdict(list)
    for one in result.get("density_of_95", []):
        held[one["layer"]] += one["heads"]
    for layer, densities in sorted(held.items()):
        print(f"layer {layer}: 95 % of the mass in {mean(densities):.3f} of the blocks")


def between(curve: list[dict[str, Any]], limit: float, name: str) -> float:
    """A figure at a time, on a straight line between two densities (of an error's logarithm); NaN outside."""
    points = sorted((row["milliseconds"], row[name]) for row in curve)
    for (left, low), (right, high) in pairwise(points):
        if left - 1e-9 <= limit <= right + 1e-9:
            share = (limit - left) / (right - left)
            if name == "error" and min(low, high) > 0:
                return math.exp(math.log(low) * (1 - share) + math.log(high) * share)
            return float(low * (1 - share) + high * share)
    return math.nan


if __name__ == "__main__":
    main()
