"""One forward on 1, 2, 4, ... GPUs: patched on one against patched and dense on several.

    python -m benchmarks.context_parallel --gpus 2 4 --out benchmarks/results/context_parallel.json

Wan 2.1 14B at 1280x720x81 and HunyuanVideo at 1280x720x129 with few layers, `pooled` and `mass` at density 0.2,
compiled, by Ulysses, by a ring, and on four by both. A part of it, short enough for a machine that is lent for minutes
(``--without-dense`` leaves dense attention out, which takes most of the time):

    python -m benchmarks.context_parallel --cases hunyuanvideo --recipes mass --degrees 2x1 --without-dense --out r.json

Degrees are of the ring x of Ulysses. Each row is one start of ``dit-accel bench --context-parallel``:
all processes measure one and several in turns, so that a ratio is of one run. What fails is written down, and the rest
goes on. The targets are those of the README's section: patched on n at least 0.85 n times as fast as patched on one,
attention and planning alone 0.9 n times, and on four 2.5 times as fast as dense on the same four.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from dit_accel import presets
from dit_accel.benchmarking.context_parallel import Shared, bench_shared
from dit_accel.cli.environment import environment

CASES = (("wan2.1-14b", 1280, 720, 81, 4), ("hunyuanvideo", 1280, 720, 129, 4))
RECIPES = ("pooled", "mass")


def degrees(text: str) -> tuple[int, int]:
    """Ring and Ulysses degree, written "2x1"."""
    ring, ulysses = (int(part) for part in text.split("x"))
    if ring < 1 or ulysses < 1:
        raise argparse.ArgumentTypeError(f"degrees are at least 1, got {text}.")
    return ring, ulysses


def degrees_of(gpus: int) -> list[tuple[int, int]]:
    """Ring and Ulysses degrees to try on so many."""
    found = [(1, gpus), (gpus, 1)]
    if gpus >= 4:
        found.append((2, gpus // 2))
    return found


def row(
    case: tuple[str, int, int, int, int], recipe: str, ring: int, ulysses: int, repeats: int, dense: bool
) -> dict[str, Any]:
    """One measurement, or why there is none."""
    arch, width, height, frames, layers = case
    shared = Shared(
        arch=arch,
        width=width,
        height=height,
        frames=frames,
        ring=ring,
        ulysses=ulysses,
        recipe=presets.resolve(recipe, density=0.2).to_dict(),
        dtype="bfloat16",
        device="cuda",
        layers=layers,
        repeats=repeats,
        dense_backend="_native_cudnn",
        compiled=True,
        dense=dense,
    )
    facts: dict[str, Any] = {"arch": arch, "recipe": recipe, "ring": ring, "ulysses": ulysses}
    try:
        data = bench_shared(shared)
    except (RuntimeError, ValueError) as error:
        return {**facts, "failed": str(error)}
    number = shared.processes
    spent = {
        name: max(sum(each["attention_per_forward"][name].values()) for each in data["ranks"])
        for name in ("patched, one", "patched, shared")
    }
    return {
        **facts,
        **data,
        "of_linear": data["speedup"]["over patched, one"] / number,
        "attention_and_plan_of_linear": spent["patched, one"] / spent["patched, shared"] / number,
        "over_dense_shared": data["speedup"].get("over dense, shared"),
        "peak_memory_gib": {name: _peak(data, name) for name in data["ranks"][0]["timings"]},
        "peak_memory_of_one": _peak(data, "patched, shared") / _peak(data, "patched, one"),
    }


def _peak(data: dict[str, Any], name: str) -> float:
    return max(each["timings"][name]["peak_memory_gib"] for each in data["ranks"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[2, 4], help="how many, where --degrees is not given")
    parser.add_argument("--cases", nargs="+", default=[case[0] for case in CASES], choices=[case[0] for case in CASES])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--degrees", type=degrees, nargs="+", help="of the ring and of Ulysses, as 2x1 or 1x2")
    parser.add_argument("--layers", type=int, help="of each model; 4 if not given")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without-dense", action="store_true", help="measure patched forwards alone")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    shared_by = asked.degrees or [found for gpus in asked.gpus for found in degrees_of(gpus)]
    rows = []
    for *case, layers in (case for case in CASES if case[0] in asked.cases):
        for recipe in asked.recipes:
            for ring, ulysses in shared_by:
                given = (*case, asked.layers or layers)
                found = row(given, recipe, ring, ulysses, asked.repeats, not asked.without_dense)
                rows.append(found)
                # Whatever comes after, this is kept.
                data = {"rows": rows, **environment(torch.device("cuda"))}
                asked.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
                shown = (
                    "failed", "of_linear", "attention_and_plan_of_linear", "over_dense_shared", "imbalance",
                    "relative_difference", "peak_memory_gib",
                )  # fmt: skip
                print(found["arch"], recipe, f"ring {ring}, Ulysses {ulysses}:", end=" ")
                print({name: found[name] for name in shown if name in found}, flush=True)


if __name__ == "__main__":
    main()
