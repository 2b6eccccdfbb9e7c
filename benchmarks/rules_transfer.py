"""A static pattern for each head, found at one size: its fidelity there and at another, beside one pattern for all.

``search_rules`` finds rules on dense runs of tuning prompts at ``--size``. Further tuning prompts are then generated at
both sizes, dense, with these rules, with rules found at the other size itself, and with the single rule of the least
error that keeps no more. PSNR is to the clips of the dense runs, all of the same noise. With ``--carried`` what the
patterns leave out in a few dense steps is added in the steps after them, and rules are found by what that leaves.

    python benchmarks/rules_transfer.py --size 192 --other 256 --frames 29 --prompts 3 --held-out 5 --out rules.json
    python benchmarks/rules_transfer.py --carried --size 192 --other 256 --frames 29 --prompts 3 --held-out 5
    python benchmarks/rules_transfer.py --size 128 --other 160 --frames 17 --prompts 1 --held-out 2 --out rules_cpu.json
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from typing import Any

import torch
from judged_calls import arguments, report
from reuse_front import TUNING_PROMPTS

import dit_accel
from dit_accel.calibration.patterns import FoundRules, kept_and_error, search_rules
from dit_accel.pipelines.embedded_model import load_embedded
from dit_accel.quality.generation import generate_clip
from dit_accel.quality.pixel import Psnr
from dit_accel.quality.video import ClipPair
from dit_accel.recipe import Recipe

FIRST_SEED = 1000
CARRIED: dict[str, Any] = {"dense_fraction": 0.1, "dense_at": (0.2, 0.5)}


def asked(size: int, args: argparse.Namespace) -> dict[str, Any]:
    return {"width": size, "height": size, "num_frames": args.frames, "num_inference_steps": args.steps}


def found_at(pipe: Any, size: int, args: argparse.Namespace) -> FoundRules:
    prompts = TUNING_PROMPTS[: args.prompts]
    recipe = dit_accel.presets.patterns(**(CARRIED if args.carried else {}))
    return search_rules(
        pipe, prompts, recipe, mean_density=args.density, seed=FIRST_SEED, generate_kwargs=asked(size, args)
    )


def fidelity(pipe: Any, size: int, recipes: dict[str, Recipe], args: argparse.Namespace) -> dict[str, Any]:
    """PSNR of each recipe's clips, with its density, dense steps apart and counted."""
    found: dict[str, Any] = {name: {"psnr": []} for name in recipes}
    for number in range(args.prompts, args.prompts + args.held_out):
        prompt, seed = TUNING_PROMPTS[number], FIRST_SEED + number
        dense = generate_clip(pipe, prompt, seed, asked(size, args)).frames
        for name, recipe in recipes.items():
            with dit_accel.patch(pipe, recipe) as handle:
                clip = generate_clip(pipe, prompt, seed, asked(size, args)).frames
                summary = handle.summary()
            found[name] |= {"density": summary.density, "mean_density": summary.mean_density}
            found[name]["psnr"].append(Psnr()(ClipPair(dense, clip)))
    for row in found.values():
        row["mean"] = sum(row["psnr"]) / max(1, len(row["psnr"]))
    return found


def main() -> None:
    parser = arguments(__doc__, size=192, frames=29, steps=10, density=0.28)
    parser.add_argument("--other", type=int, default=256)
    parser.add_argument("--carried", action="store_true", help="add what is left out of dense steps after them")
    parser.add_argument("--prompts", type=int, default=3, help="to search on")
    parser.add_argument("--held-out", type=int, default=5, help="to judge on; 0: errors of the search alone")
    args = parser.parse_args()
    begin = time.monotonic()
    pipe = load_embedded(torch.bfloat16 if args.device == "cuda" else torch.float32).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    rules = {size: found_at(pipe, size, args) for size in (args.size, args.other)}
    own = rules[args.size]
    recipes = {f"found at {size}": one.recipe for size, one in rules.items()}
    if own.best_single is not None:
        recipes["one for all"] = own.recipe.with_fields({"select.rules": ((own.best_single,),)})
    found: dict[str, Any] = {
        str(size): {
            "error": one.error,
            "error of one": one.error_single,
            "one": one.best_single,
            "heads": dict(Counter(rule for layer in one.recipe.to_dict()["select"]["rules"] for rule in layer)),
        }
        for size, one in rules.items()
    }
    for size, other in ((args.size, args.other), (args.other, args.size)):
        density, error = kept_and_error(rules[other].errors, rules[size].recipe.select.rules)
        found[str(size)]["at the other size"] = {"density": density, "error": error}
        found[str(size)]["runs"] = fidelity(pipe, size, recipes, args)
    report(found, args, begin)


if __name__ == "__main__":
    main()
