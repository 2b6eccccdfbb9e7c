"""A server's memory: many generations of varied sizes on one patched pipeline.

    python benchmarks/memory_server.py [--generations 200] [--json out.json]

A tiny Wan pipeline with random weights, on the CPU: what would grow is what a patch keeps, not what a model holds.
Sizes repeat now and then, as a server's do, step counts vary, and every fifth run is broken off. Printed: resident
memory, the tensors alive, and whether the model's memory comes back when the pipeline is dropped.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import random
import sys
import weakref
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import dit_accel
from dit_accel import Recipe
from dit_accel.stages.order.simple import Tiles
from dit_accel.stages.schedule import Schedule
from dit_accel.stages.select.mass import Mass
from tests.tiny import TINY

RECIPE = Recipe(Tiles((2, 4, 4)), Mass(density=0.4, block=(32, 32)), schedule=Schedule(refresh_every=2))
EVERY = 20
# Of the last half of the generations, MiB: what the allocator's own arenas move by.
MOST_GROWTH = 24.0


def resident_mib() -> float:
    """Resident memory of this process (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def tensors_alive() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


class Stop(Exception):
    pass


def generate(pipe: Any, pick: random.Random) -> None:
    """One generation of a size that may have been there before."""
    height, width = (16 * pick.randint(3, 9) for _ in range(2))
    break_off = pick.random() < 0.2

    def at_step(_pipe: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if break_off and step == 1:
            raise Stop
        return values

    size = {"height": height, "width": width, "num_frames": 4 * pick.randint(0, 3) + 1}
    with contextlib.suppress(Stop):
        TINY["wan"].run(pipe, steps=pick.randint(2, 5), callback_on_step_end=at_step, **size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", type=int, default=200)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    pick, rows = random.Random(0), []
    pipe = TINY["wan"].build()
    handle = dit_accel.patch(pipe, RECIPE)
    for number in range(1, asked.generations + 1):
        generate(pipe, pick)
        if number % EVERY == 0 or number == asked.generations:
            rows.append({"generations": number, "mib": round(resident_mib(), 1), "tensors": tensors_alive()})
            print(f"{number:>5} generations: {rows[-1]['mib']:8.1f} MiB resident, {rows[-1]['tensors']} tensors alive")
    half = [row for row in rows if row["generations"] >= asked.generations / 2]
    growth = half[-1]["mib"] - half[0]["mib"]
    model = weakref.ref(pipe.transformer)
    sparse = handle.summary().sparse_calls
    del pipe, handle
    gc.collect()
    freed = model() is None
    print(f"{sparse} sparse calls; growth of the last half: {growth:.1f} MiB; dropped pipeline freed: {freed}")
    if asked.json:
        found = {"rows": rows, "growth_mib": growth, "freed": freed, "sparse_calls": sparse}
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if growth > MOST_GROWTH or not freed:
        raise SystemExit("Memory grows, or is not given back.")


if __name__ == "__main__":
    main()
