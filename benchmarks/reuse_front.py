"""Whole runs of the embedded model with reuse across steps, sparse attention, or both: what is computed, what is lost.

Every prompt is generated dense once, then under each row, with the same seed. A row is a preset, or one with a reuse:

    PRESET[:OPTION=VALUE,...][@FIELD=VALUE,...][+REUSE[:FIELD=VALUE,...]][/LINEAR]

LINEAR is the format of the linear layers, fp8 or int8. A whole run leaves layers as narrow as this model's alone; here
all are cast, so that there is something to see. With --adapter the preset "adapter" is what that one was trained with.

    python benchmarks/reuse_front.py --prompts 16 --steps 30 --out front.json
    python benchmarks/reuse_front.py --rows dense+first_block:threshold=.12 "mass:density=.3+listed:computed=(0,3)"
    python benchmarks/reuse_front.py --adapter gate/adapter --rows adapter@select.density=.1 pooled:density=.1
    python benchmarks/reuse_front.py --magnitudes --prompts 4 --steps 30    # ratios for reuse magnitude
    python benchmarks/reuse_front.py --set scores --tuning --prompts 8 --shards 8 --out scores.json   # front_rows.py
    python benchmarks/reuse_front.py --show front.json
    python benchmarks/reuse_front.py --docs front10.json front30.json       # tables and picture of docs/fidelity.md

A run that was broken off goes on where it was: the file and the dense clips beside it are read. With --minutes it ends
by itself, between two clips, and the same command goes on; shards go on from the one file of all where theirs are gone.
PSNR is of 8-bit frames to the dense clip, the mean over prompts with a 95% bootstrap interval, of fewer than ten the
range. Seconds are of whole calls one after the other, and mean little on a busy machine.
"""

from __future__ import annotations

import argparse
import ast
import json
import platform
import re
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from front_report import PAGE, PICTURE, write_docs
from front_rows import SETS

from dit_accel import Recipe, load_adapter, patch, presets
from dit_accel.acceleration.linears import quantize_linears, refuse_format
from dit_accel.pipelines import load
from dit_accel.pipelines.generate import call_arguments
from dit_accel.quality.bootstrap import bootstrap_mean
from dit_accel.quality.generation import Generated, generate_clip
from dit_accel.quality.measurement import number_to_json
from dit_accel.quality.metrics import find_metrics, measure
from dit_accel.quality.prompts import DEFAULT_PROMPTS
from dit_accel.quality.video import ClipPair
from dit_accel.training.adapter_files import read_adapter

# To choose rows by: none of the sixteen on which they are reported.
TUNING_PROMPTS = (
    "a red dragon flying right over a meadow",
    "two small purple fish moving right over a meadow",
    "a robot standing still in a forest",
    "a big green monster coming closer over the desert",
    "a ghost circling over a city at night",
    "a blue car bouncing over snowy mountains",
    "an owl flying up in space",
    "three orange birds flying left in a cloudy sky",
)
# Narrower than any layer of the built-in model.
EVERY_WIDTH = 16
METRICS = ("psnr", "ssim", "lpips", "flicker", "latent_mse")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", help="in place of a set")
    parser.add_argument("--adapter", type=Path, help="of a fine-tuning, for rows of that name")
    parser.add_argument("--set", default="reuse", choices=list(SETS), help="rows of front_rows.py")
    parser.add_argument("--shards", type=int, help="so many processes, each with its share of the prompts")
    parser.add_argument("--prompts", type=int, default=len(DEFAULT_PROMPTS), help="how many, each with its own seed")
    parser.add_argument("--first", type=int, default=0, help="number of the first prompt and seed")
    parser.add_argument("--tuning", action="store_true", help="take prompts and seeds that no table reports")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--frames", type=int, default=29)
    parser.add_argument("--model", default="embedded", help="a built-in one of prompts, or embedded-long")
    parser.add_argument("--size", default="192", help="pixels in height and in width, or WIDTHxHEIGHT")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--magnitudes", action="store_true", help="print the ratios that reuse magnitude needs")
    parser.add_argument("--minutes", type=float, help="make no further clip after so many")
    parser.add_argument("--show", type=Path, help="print the table of a file")
    parser.add_argument("--docs", type=Path, nargs="+", help="write the tables and the picture of these files")
    parser.add_argument("--card", type=Path, help="of `dit-accel verify`, for the first panel of the picture")
    parser.add_argument("--page", type=Path, default=PAGE, help="where --docs writes the tables")
    parser.add_argument(
        "--picture", type=Path, default=PICTURE, help="where --docs draws, in a folder below the page's"
    )
    parser.add_argument("--out", type=Path, default=Path("reuse_front.json"))
    args = parser.parse_args()
    if args.show:
        show(json.loads(args.show.read_text()))
        return
    if args.docs:
        write_docs(args.docs, args.page, args.picture, args.card)
        return
    recipes = {
        row: recipe_of(row, args.adapter) for row in args.rows or SETS[args.set]
    }  # a mistake is found before the first clip
    if args.shards:
        show(in_shards(args))
        return
    pipe = load(args.model, dtype=getattr(torch, args.dtype), device=torch.device(args.device))
    pipe.set_progress_bar_config(disable=True)
    if args.magnitudes:
        print(json.dumps([round(ratio, 4) for ratio in magnitudes(pipe, args)]))
        return
    show(Front(pipe, args).run(recipes))


def linear_of(row: str) -> str | None:
    """The format of a row's linear layers; None where they stay as they are."""
    _, given, linear = row.partition("/")
    return linear if given else None


def recipe_of(row: str, adapter: Path | None = None) -> Recipe:
    """The recipe of a row, which may be that of an adapter.

    Raises:
        ValueError: what a row or a value does not allow.
    """
    linear = linear_of(row)
    if linear is not None:
        refuse_format(linear)
    named, _, reuse = row.partition("/")[0].partition("+")
    named, _, changed = named.partition("@")
    name, _, options = named.partition(":")
    if adapter is not None and is_of_adapter(row):
        recipe = read_adapter(adapter).recipe
    else:
        recipe = presets.resolve(name, **{key: ast.literal_eval(value) for key, value in pairs(options)})
    recipe = recipe.with_fields(dict(pairs(changed)))
    if not reuse:
        return recipe
    kind, _, fields = reuse.partition(":")
    return recipe.with_fields({"reuse": kind} | {f"reuse.{key}": value for key, value in pairs(fields)})


def is_of_adapter(row: str) -> bool:
    """Whether a row runs the adapter that was given."""
    return re.match(r"adapter(?![\w:])", row) is not None


def in_shards(args: argparse.Namespace) -> dict[str, Any]:
    """One process a share of the prompts, then one file of what they left; a prompt's shard goes on where it was."""
    own = {"--shards", "--out", "--first", "--prompts"}
    given = [a for n, a in enumerate(sys.argv[1:], 1) if a not in own and sys.argv[n - 1] not in own]
    each = -(-args.prompts // args.shards)
    together = json.loads(args.out.read_text()) if args.out.exists() else None
    parts, children = [], []
    for first in range(args.first, args.first + args.prompts, each):
        number = min(each, args.first + args.prompts - first)
        parts.append(args.out.with_suffix(f".from{first}.json"))
        if together is not None and not parts[-1].exists():
            seeds = {str(seed) for seed, _ in numbered_prompts(args)[first - args.first :][:number]}
            parts[-1].write_text(json.dumps(part_of(together, seeds), indent=1) + "\n")
        shard = ["--first", str(first), "--prompts", str(number), "--out", str(parts[-1])]
        children.append(subprocess.Popen([sys.executable, __file__, *given, *shard], stdout=subprocess.DEVNULL))
    codes = [child.wait() for child in children]
    result = merged([json.loads(part.read_text()) for part in parts if part.exists()])
    result["facts"]["command"] = " ".join(["python", *sys.argv])
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    if any(codes):
        raise SystemExit(f"Shards ended with {codes}; the same command goes on where they were.")
    return result


def part_of(result: dict[str, Any], seeds: set[str]) -> dict[str, Any]:
    """What a file has of some prompts."""

    def only(clips: dict[str, Any]) -> dict[str, Any]:
        return {seed: clip for seed, clip in clips.items() if seed in seeds}

    rows = {name: row | {"clips": only(row["clips"])} for name, row in result["rows"].items()}
    return result | {"dense_seconds": only(result["dense_seconds"]), "rows": rows}


def merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One file of several, of the same settings and recipes.

    Raises:
        SystemExit: there is none, or they differ.
    """
    if not parts:
        raise SystemExit("No shard made a clip.")
    result = {**parts[0], "dense_seconds": {}, "rows": {}}
    for part in parts:
        if part["settings"] != result["settings"]:
            raise SystemExit(f"Shards of {part['settings']} and {result['settings']} are not of one run.")
        result["dense_seconds"] |= part["dense_seconds"]
        for name, row in part["rows"].items():
            known = result["rows"].setdefault(name, {"recipe": row["recipe"], "clips": {}})
            if known["recipe"] != row["recipe"]:
                raise SystemExit(f"Shards have {name} of two versions.")
            known["clips"] |= row["clips"]
    return result


def pairs(text: str) -> list[tuple[str, str]]:
    """``a=1,b=(2,3)`` as pairs: commas within parentheses part nothing."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    split = [part.partition("=") for part in parts if part]
    return [(name.strip(), value.strip()) for name, _, value in split]


def arguments_of(pipe: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What a pipeline is called with, but for the prompt."""
    width, _, height = args.size.partition("x")
    size = {"width": int(width), "height": int(height or width), "frames": args.frames}
    return call_arguments(pipe, **size, steps=args.steps, guidance=args.guidance)


def numbered_prompts(args: argparse.Namespace) -> list[tuple[int, str]]:
    """Seeds and prompts; those to choose by have seeds of their own."""
    prompts, seed = (TUNING_PROMPTS, 1000) if args.tuning else (DEFAULT_PROMPTS, 0)
    return [(seed + n, prompts[n % len(prompts)]) for n in range(args.first, args.first + args.prompts)]


class Front:
    """The clips of all rows, and the file that they are written to, one after the other."""

    def __init__(self, pipe: Any, args: argparse.Namespace) -> None:
        self.pipe, self.args = pipe, args
        self.end = float("inf") if args.minutes is None else time.monotonic() + 60 * args.minutes
        self.metrics = find_metrics(METRICS)
        self.arguments = arguments_of(pipe, args)
        self.prompts = numbered_prompts(args)
        self.folder = args.out.with_suffix(".dense")
        self.settings = {
            name: getattr(args, name) for name in ("model", "steps", "frames", "size", "guidance", "dtype", "device")
        }

    def run(self, recipes: dict[str, Recipe]) -> dict[str, Any]:
        result = self.begin()
        self.folder.mkdir(parents=True, exist_ok=True)
        for number, prompt in self.prompts:
            if time.monotonic() > self.end:
                break
            dense = self.dense(number, prompt)
            result["dense_seconds"][str(number)] = dense.seconds
            for row, recipe in recipes.items():
                as_data = json.loads(json.dumps(recipe.to_dict()))
                known = result["rows"].setdefault(row, {"recipe": as_data, "clips": {}})
                if known["recipe"] != as_data:
                    raise SystemExit(f"{self.args.out} has {row} of another version; give another --out.")
                if str(number) in known["clips"] or time.monotonic() > self.end:
                    continue
                clip = known["clips"][str(number)] = self.clip(row, recipe, number, prompt, dense)
                print(
                    f"prompt {number}, {row}: {clip['psnr']} dB, {clip['seconds']:.1f} s", file=sys.stderr, flush=True
                )
                self.args.out.write_text(json.dumps(result, indent=1) + "\n")
        return result

    def begin(self) -> dict[str, Any]:
        """An empty result, or that of the run that was broken off."""
        facts = {"torch": torch.__version__, "machine": platform.machine(), "command": " ".join(["python", *sys.argv])}
        if self.args.device.startswith("cuda"):
            facts["device"] = torch.cuda.get_device_name()
        fresh = {"settings": self.settings, "facts": facts, "dense_seconds": {}, "rows": {}}
        if not self.args.out.exists():
            return fresh
        found: dict[str, Any] = json.loads(self.args.out.read_text())
        if found["settings"] != self.settings:
            raise SystemExit(f"{self.args.out} is of {found['settings']}, not of {self.settings}; give another --out.")
        return found

    def dense(self, number: int, prompt: str) -> Generated:
        path = self.folder / f"{number}.pt"
        if not path.exists():
            made = generate_clip(self.pipe, prompt, number, self.arguments)
            torch.save({"frames": made.frames, "latents": made.latents, "seconds": made.seconds}, path)
        kept = torch.load(path)
        return Generated(kept["frames"], True, kept["latents"], kept["seconds"])

    def clip(self, row: str, recipe: Recipe, number: int, prompt: str, dense: Generated) -> dict[str, Any]:
        """One clip under a recipe, and what it lost."""
        linear = linear_of(row)
        computed: Counter[int] = Counter()
        last = self.pipe.transformer.blocks[-1]
        with ExitStack() as undone:
            if linear is not None:
                undone.callback(quantize_linears(self.pipe, linear, least_width=EVERY_WIDTH)[0])
            if self.args.adapter is not None and is_of_adapter(row):
                patched = load_adapter(self.pipe, self.args.adapter, recipe=recipe)
            else:
                patched = patch(self.pipe, recipe)
            handle = undone.enter_context(patched)
            count = last.register_forward_hook(lambda *_: computed.update([self.pipe.scheduler.step_index or 0]))
            made = generate_clip(self.pipe, prompt, number, self.arguments)
            count.remove()
            summary = handle.summary()
        pair = ClipPair(dense.frames, made.frames, 16.0, dense.latents, made.latents)
        measured = measure(pair, self.metrics)
        values = {name: None if one.value is None else number_to_json(one.value) for name, one in measured.items()}
        return values | {
            "seconds": made.seconds,
            "computed_share": 1.0 if summary.computed_share is None else summary.computed_share,
            "computed_steps": sorted(computed),
            "density": summary.density,
            "mean_density": summary.mean_density,
            "plan_seconds": summary.plan_seconds,
            "nan_calls": summary.nan_calls,
            "notes": [*summary.notes, *(one.reason for one in measured.values() if one.reason)],
        }


def magnitudes(pipe: Any, args: argparse.Namespace) -> list[float]:
    """Mean ratio of each step over prompts and branches, by diffusers' own calibration."""
    from diffusers import MagCacheConfig

    # One step more than there are: diffusers drops what it found when the last is done.
    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=args.steps + 1))
    hook = pipe.transformer.blocks[0]._diffusers_hook.get_hook("mag_cache_leader_block_hook")
    found: list[list[float]] = []

    def keep(_pipe: Any, step: int, _timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        if step == args.steps - 1:
            found.extend(list(one.calibration_ratios) for one in hook.state_manager._state_cache.values())
        return state

    arguments = arguments_of(pipe, args)
    for n, prompt in numbered_prompts(args):
        generator = torch.Generator().manual_seed(n)
        pipe(prompt=prompt, generator=generator, output_type="latent", callback_on_step_end=keep, **arguments)
    pipe.transformer.disable_cache()
    return torch.tensor(found).mean(0).tolist()


def show(result: dict[str, Any]) -> None:
    """A table for the terminal, the most faithful row first."""
    print(
        f"{'row':<44}{'clips':>6}{'computed':>9}{'density':>8}{'product':>8}{'PSNR':>7}{'low':>7}{'high':>7}{'SSIM':>8}{'speed':>7}"
    )
    rows = []
    for name, row in result["rows"].items():
        clips = row["clips"]
        if not clips:
            continue
        share, density = (mean(clips, key) for key in ("computed_share", "mean_density"))
        psnr = bootstrap_mean([float(clip["psnr"]) for clip in clips.values()])
        dense = sum(result["dense_seconds"][number] for number in clips)
        speed = dense / sum(clip["seconds"] for clip in clips.values())
        text = f"{name:<44}{len(clips):>6}{share:>9.3f}{density:>8.3f}{share * density:>8.3f}"
        text += f"{psnr.mean:>7.2f}{psnr.low:>7.2f}{psnr.high:>7.2f}{mean(clips, 'ssim'):>8.4f}{speed:>7.2f}"
        rows.append((psnr.mean, text + often(clips)))
    for _, text in sorted(rows, reverse=True):
        print(text)


def mean(clips: dict[str, Any], key: str) -> float:
    return sum(float(clip[key]) for clip in clips.values()) / len(clips)


def often(clips: dict[str, Any]) -> str:
    """The steps that at least half of the clips computed, where some were skipped: what a list would hold."""
    count = Counter(step for clip in clips.values() for step in clip["computed_steps"])
    if all(clip["computed_share"] == 1.0 for clip in clips.values()):
        return ""
    return "  " + ",".join(str(step) for step, times in sorted(count.items()) if 2 * times >= len(clips))


if __name__ == "__main__":
    main()
