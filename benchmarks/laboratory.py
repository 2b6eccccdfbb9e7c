"""Any selection with any stand-in for what it leaves out, on recorded calls: errors of the output at equal time.

Calls of the embedded model are recorded once (dense runs; prompts and seeds that no table reports) and kept in a folder that
git ignores. Plans of a search are of the recorded step before all others, as the preset ``mass`` makes them; others are
of the call itself. For each row: relative L2 error of the attention output to dense attention in float64 (root of the
summed squares over calls, the mean over calls beside it), the attention mass that is kept, the density, and a time by
``lab_cost.py``. Errors at equal time are interpolated in the logarithm between densities.

    python benchmarks/laboratory.py --record --prompts 2              # CPU: some minutes a prompt; CUDA: seconds
    python benchmarks/laboratory.py --prompts 2 --out laboratory.json
    python benchmarks/laboratory.py --selections mass pooled --stands nothing mean --layers 2 5
    python benchmarks/laboratory.py --show laboratory.json --at 0.2
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lab_cost import CostModel
from lab_rows import (
    MEMORIES,
    SELECTIONS,
    STANDS,
    Carried,
    Found,
    Memory,
    Selection,
    Stand,
    keep_by,
    own_keys,
)
from lab_sums import Head, added
from recorded_calls import Recorded, read, record
from reuse_front import TUNING_PROMPTS

from dit_accel.stages.order.simple import Tiles

FIRST_SEED = 1000
NUM_STEPS, SEARCH, LATER = 30, 5, (8, 12, 18, 24, 29)
DENSITIES = (0.05, 0.1, 0.15, 0.2)
FOLDER = Path("outputs/laboratory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="record calls that are not there yet, and stop")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the recorded calls")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--layers", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 18, 29], help=f"of {LATER}, of {NUM_STEPS}")
    parser.add_argument("--branches", nargs="+", default=["cond"], help="cond, uncond, or both")
    parser.add_argument("--tile", type=int, nargs=3, default=[4, 4, 4])
    parser.add_argument("--block", type=int, nargs=2, default=[128, 64])
    parser.add_argument("--every", type=int, default=4, help="score every n-th query block")
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    parser.add_argument("--selections", nargs="+", help="names; default: all")
    parser.add_argument("--stands", nargs="+", help="names of what stands in; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"], help="of the methods' sums")
    parser.add_argument(
        "--at", type=float, default=0.1, help="the time of `mass` alone at this density is that of the table"
    )
    parser.add_argument("--show", type=Path, help="print the table of a file")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_flush_denormal(True)  # the exponentials of small logits
    if args.show:
        show(json.loads(args.show.read_text()), args.at)
        return
    numbers = [FIRST_SEED + n for n in range(args.prompts)]
    if args.record:
        dtype = torch.bfloat16 if args.device != "cpu" else torch.float32
        prompts = list(zip(numbers, TUNING_PROMPTS))
        record(args.folder, prompts, (SEARCH, *LATER), NUM_STEPS, args.device, dtype)
        return
    selections = [s for s in SELECTIONS if args.selections is None or s.name in args.selections]
    stands = [s for s in (*STANDS, *MEMORIES) if args.stands is None or s.name in args.stands]
    result = measure(args, numbers, selections, stands)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    show(result, args.at)


@dataclass
class Sums:
    """Over the calls of one row."""

    error: float = 0.0
    norm: float = 0.0
    relative: list[float] = field(default_factory=list)
    mass: list[float] = field(default_factory=list)
    density: list[float] = field(default_factory=list)
    layers: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))


def measure(
    args: argparse.Namespace, numbers: list[int], selections: list[Selection], stands: list[Stand | Memory]
) -> dict[str, Any]:
    """All rows, over all calls that were asked for."""
    begin = time.perf_counter()
    sums: dict[tuple[str, str, float], Sums] = defaultdict(Sums)
    searches: dict[tuple[int, str, int], list[Found]] = {}
    plans: dict[tuple[int, str, int], dict[tuple[str, float], torch.Tensor]] = {}
    carried: dict[tuple[int, str, int], list[Carried]] = defaultdict(list)
    calls = 0
    for call in read(args.folder, numbers):
        if call.layer not in args.layers or call.branch not in args.branches:
            continue
        place = (call.prompt, call.branch, call.layer)
        if call.step == SEARCH:
            heads = heads_of(call, args, 1)
            searches[place] = [Found.of(head) for head in heads]
            plans[place] = searched_plans(searches[place], own_keys(heads[0]), selections, args.densities)
            if any(isinstance(stand, Memory) for stand in stands):
                carried[place] = carried_of(heads_of(call, args, args.every), plans[place])
        elif call.step in args.steps:
            score(
                call.layer,
                heads_of(call, args, args.every),
                args,
                searches[place],
                plans[place],
                carried[place],
                selections,
                stands,
                sums,
            )
            calls += 1
            print(f"\r{calls} calls, {time.perf_counter() - begin:.0f} s", end="", file=sys.stderr, flush=True)
    model = CostModel.measured()
    rows = []
    for (selection, stand, asked), one in sums.items():
        plan = next(s.plan for s in selections if s.name == selection)
        columns = next(s.columns for s in stands if s.name == stand)
        density = sum(one.density) / len(one.density)
        rows.append(
            {
                "selection": selection,
                "stand": stand,
                "asked_density": asked,
                "density": density,
                "mass": sum(one.mass) / len(one.mass),
                "error": math.sqrt(one.error / one.norm),
                "mean_error": sum(one.relative) / len(one.relative),
                "mean_error_of_layers": {layer: sum(found) / len(found) for layer, found in one.layers.items()},
                "milliseconds": model.milliseconds(density, columns, plan, args.block[0]),
            }
        )
    facts = {
        "command": " ".join(["python", *sys.argv]),
        "prompts": [TUNING_PROMPTS[n - FIRST_SEED] for n in numbers],
        "seeds": numbers,
        "calls": calls,
        "heads": 4,
        "layers": args.layers,
        "search_step": SEARCH,
        "steps": args.steps,
        "num_steps": NUM_STEPS,
        "branches": args.branches,
        "tile": args.tile,
        "block": args.block,
        "device": torch.cuda.get_device_name() if args.device != "cpu" else f"CPU ({platform.machine()})",
        "torch": torch.__version__,
        "seconds": time.perf_counter() - begin,
        "cost_model": vars(model),
    }
    return {"facts": facts, "rows": rows}


def heads_of(call: Recorded, args: argparse.Namespace, every: int) -> list[Head]:
    """The heads of a call in tile order, with every n-th block of queries."""
    rows = Tiles(tuple(args.tile)).rows(call.layout, torch.device("cpu"))
    dtype = getattr(torch, args.dtype)
    q, k, v = (x if rows is None else x[:, rows.long()] for x in (call.q, call.k, call.v))
    q, k, v = (x.to(args.device, dtype) for x in (q, k, v))
    blocks = torch.arange(every // 2, q.shape[1] // args.block[0], every, device=q.device)
    q = q.unflatten(1, (-1, args.block[0]))[:, blocks].flatten(1, 2)
    return [Head(*one, *args.block, blocks) for one in zip(q, k, v)]


def searched_plans(
    found: list[Found], own: torch.Tensor, selections: list[Selection], densities: list[float]
) -> dict[tuple[str, float], torch.Tensor]:
    """bool ``[H, nq, nk]`` of each selection whose scores are the search's."""
    plans = {}
    for selection in selections:
        if selection.searched is not None:
            scores = torch.stack([selection.searched(one) for one in found])
            for density in densities:
                plans[selection.name, density] = keep_by(selection.budget, scores, density, own)
    return plans


def carried_of(heads: list[Head], plans: dict[tuple[str, float], torch.Tensor]) -> list[Carried]:
    """Of all plans of a search, for each head."""
    keep = torch.stack(list(plans.values()))[:, :, heads[0].blocks]
    return [Carried.of(head, keep[:, n]) for n, head in enumerate(heads)]


def dense(head: Head) -> torch.Tensor:
    """The reference, in float64."""
    q, k, v = (x.double() for x in (head.q, head.k, head.v))
    return (q @ k.T * head.scale).softmax(-1) @ v


def score(
    layer: int,
    heads: list[Head],
    args: argparse.Namespace,
    searches: list[Found],
    plans: dict[tuple[str, float], torch.Tensor],
    carried: list[Carried],
    selections: list[Selection],
    stands: list[Stand | Memory],
    sums: dict[tuple[str, str, float], Sums],
) -> None:
    """Add the errors of one call to those of its rows."""
    own, blocks = own_keys(heads[0]), heads[0].blocks
    keys, keeps = [], []
    for selection in selections:
        scores = (
            None
            if selection.scores is None
            else torch.stack([selection.scores(*pair) for pair in zip(searches, heads)])
        )
        for density in args.densities:
            keys.append((selection.name, density))
            known = plans[selection.name, density][:, blocks] if scores is None else None
            keeps.append(keep_by(selection.budget, scores, density, own) if scores is not None else known)
    keep = torch.stack(keeps)  # [R, H, nq, nk]
    error = torch.zeros(len(stands), len(keys), dtype=torch.float64)
    norm, mass = 0.0, torch.zeros(len(keys), dtype=torch.float64)
    for n, (head, found) in enumerate(zip(heads, searches)):
        exact = dense(head)
        norm += float(exact.square().sum())
        kept = added(head.exact, keep[:, n])
        mass += (head.mass * keep[:, n]).sum((1, 2)).double().cpu() / (len(blocks) * len(heads))
        for s, stand in enumerate(stands):
            weight, value = kept
            if isinstance(stand, Memory):
                # Plans of searches come first.
                known = carried[n].difference.shape[0]
                out = stand.apply(carried[n], (value / weight[..., None])[:known])
                error[s, :known] += (out - exact.to(value.dtype)).square().sum((1, 2)).double().cpu()
                error[s, known:] = math.nan
                continue
            if stand.estimate is not None:
                other = added(stand.estimate(found, head), ~keep[:, n])
                weight, value = weight + other[0], value + other[1]
            error[s] += (value / weight[..., None] - exact.to(value.dtype)).square().sum((1, 2)).double().cpu()
    density = keep.float().mean((1, 2, 3)).tolist()
    for r, (selection_name, asked) in enumerate(keys):
        for s, stand in enumerate(stands):
            one = sums[selection_name, stand.name, asked]
            one.error += float(error[s, r])
            one.norm += norm
            one.relative.append(math.sqrt(float(error[s, r]) / norm))
            one.layers[layer].append(one.relative[-1])
            one.mass.append(float(mass[r]))
            one.density.append(density[r])


def show(result: dict[str, Any], at: float) -> None:
    """The table at the time of ``mass`` alone at a density, the least error first."""
    curves: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in result["rows"]:
        curves[row["selection"], row["stand"]].append(row)
    plain = curves.get(("mass", "nothing")) or next(iter(curves.values()))
    limit = next(row["milliseconds"] for row in plain if math.isclose(row["asked_density"], at))
    print(f"{result['facts']['calls']} calls; at {limit:.3f} ms, the time of mass alone at {at}")
    print(f"{'selection':<22}{'stands in':<34}{'error':>8}{'mean':>8}{'density':>9}{'mass':>8}")
    table = []
    for (selection, stand), curve in curves.items():
        found = {name: between(curve, limit, name) for name in ("error", "mean_error", "density", "mass")}
        table.append((found["error"], selection, stand, found))
    for error, selection, stand, found in sorted(table, key=lambda one: (math.isnan(one[0]), one[0])):
        rest = f"{found['mean_error']:>8.4f}{found['density']:>9.3f}{found['mass']:>8.4f}"
        print(f"{selection:<22}{stand:<34}{error:>8.4f}{rest}")


def between(curve: list[dict[str, Any]], limit: float, name: str) -> float:
    """A figure at a time, on a straight line between two densities (of an error's logarithm); NaN outside."""
    points = sorted((row["milliseconds"], row[name]) for row in curve)
    for (left, low), (right, high) in zip(points, points[1:]):
        if left - 1e-9 <= limit <= right + 1e-9:
            share = (limit - left) / (right - left)
            if "error" in name and min(low, high) > 0:
                return float(math.exp(math.log(low) * (1 - share) + math.log(high) * share))
            return float(low * (1 - share) + high * share)
    return math.nan


if __name__ == "__main__":
    main()
