"""What every preset costs in fidelity on the embedded model, at equal densities, against dense attention.

The same prompts and seeds are generated dense and under each recipe, all prompts of a recipe in one batch; PSNR,
SSIM, flicker and the error of the final latents are taken clip by clip, with bootstrap intervals over clips (of few
clips ranges). The settings of methods without a density of their own are fitted on recorded queries and keys. A method
that fails is recorded, and the rest goes on.

    python benchmarks/fidelity.py --shards 5 --out fidelity.json          # five processes share the GPU
    python benchmarks/fidelity.py --methods pooled adaspa --clips 2 --steps 4 --frames 5 --out small.json
    python benchmarks/fidelity.py --weights --shards 10 --out weights.json   # PARO's score weight, 10 rows
    python benchmarks/fidelity.py --quick --device cpu --dtype float32     # does every row run?
    python benchmarks/fidelity.py --merge part0.json part1.json --out fidelity.json
    python benchmarks/fidelity.py --show fidelity.json

Seconds are those of a batch while other processes share the device: a rough guide only.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fidelity_presets import METHODS, WEIGHTS, Method, at_density, method

from dit_accel import CalibrationArtifact, Recipe, calibrate, patch
from dit_accel.call import AttentionCall
from dit_accel.pipelines import load
from dit_accel.pipelines.generate import call_arguments
from dit_accel.quality.bootstrap import bootstrap_mean
from dit_accel.quality.measurement import number_to_json
from dit_accel.quality.metrics import find_metrics, measure
from dit_accel.quality.prompts import DEFAULT_PROMPTS
from dit_accel.quality.video import ClipPair, as_video, to_uint8

CALIBRATION_PROMPTS = (
    "a blue penguin bouncing over a meadow",
    "two red robots flying left in space",
    "a small yellow car standing still in a forest",
)
METRIC_NAMES = ("psnr", "ssim", "flicker", "latent_mse")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=[m.name for m in METHODS], help="rows; default: all")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.3, 0.2, 0.5, 0.1])
    parser.add_argument("--clips", type=int, default=len(DEFAULT_PROMPTS), help="prompts, each with a seed of its own")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--frames", type=int, default=29)
    parser.add_argument("--size", type=int, default=192, help="pixels in height and in width")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=16, help="clips generated at once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--threads", type=int, default=3, help="of the metrics")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no row after this time")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="take every N-th row, from the I-th")
    parser.add_argument("--shards", type=int, help="run this many processes, one shard each, and merge")
    parser.add_argument("--merge", type=Path, nargs="+", help="files of shards")
    parser.add_argument("--weights", action="store_true", help="PARO's score weights at densities 0.3 and 0.2")
    parser.add_argument("--quick", action="store_true", help="one small clip of few steps, one density: does it run?")
    parser.add_argument("--show", type=Path, help="print the table of a file")
    parser.add_argument("--out", type=Path, default=Path("fidelity.json"))
    args = parser.parse_args()
    if args.weights:
        args.methods, args.densities = [m.name for m in WEIGHTS], [0.3, 0.2]
    if args.quick:
        args.clips, args.batch, args.frames, args.size, args.densities = 1, 1, 5, 96, args.densities[:1]
        args.steps = 4  # the fewest that have a dense step, a search and a plan reused
    if args.show:
        show(json.loads(args.show.read_text()))
    elif args.merge:
        write(merge([json.loads(path.read_text()) for path in args.merge]), args.out)
    elif args.shards:
        launch(args)
    else:
        write(sweep(args), args.out)


def launch(args: argparse.Namespace) -> None:
    """One process a shard, then one file of what they left."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    parts = [args.out.with_suffix(f".part{n}.json") for n in range(args.shards)]
    own = {"--shards", "--out"}
    given = [a for n, a in enumerate(sys.argv[1:], 1) if a not in own and sys.argv[n - 1] not in own]
    children = []
    for n, part in enumerate(parts):
        part.unlink(missing_ok=True)
        command = [sys.executable, __file__, *given, "--shard", f"{n}/{args.shards}", "--out", str(part)]
        children.append(subprocess.Popen(command))
    codes = [child.wait() for child in children]
    found = [json.loads(part.read_text()) for part in parts if part.exists()]
    if not found:
        raise SystemExit(f"No shard left a file; their exit codes are {codes}.")
    result = merge(found)
    result["exit_codes"] = codes
    result["facts"]["command"] = " ".join(["python", *sys.argv])
    write(result, args.out)
    for part in parts:
        part.unlink(missing_ok=True)


def sweep(args: argparse.Namespace) -> dict[str, Any]:
    """All rows of this shard. The file is written after each, so that a broken run leaves what it had."""
    start = time.perf_counter()
    index, count = (int(part) for part in args.shard.split("/"))
    rows = [(method(name), density) for density in args.densities for name in args.methods]
    rows = [(m, d) for m, d in rows if not m.fixed or d == args.densities[0]][index::count]
    torch.set_num_threads(max(1, min(args.threads, torch.get_num_threads())) if args.device != "cpu" else 2)
    device = torch.device(args.device)
    pipe = load("embedded", dtype=getattr(torch, args.dtype), device=device)
    pipe.set_progress_bar_config(disable=True)
    run = Sweep(pipe, args)
    result: dict[str, Any] = {"facts": run.facts(), "rows": [], "order": args.methods}
    with ThreadPoolExecutor(args.threads) as pool:
        dense = run.dense(record=any(chosen.is_fitted for chosen, _ in rows))
        result["dense_seconds"] = run.seconds
        print(f"shard {index}: dense in {run.seconds:.1f} s, {len(rows)} rows to go", flush=True)
        waiting: list[Future[dict[str, Any]]] = []
        for chosen, density in rows:
            if time.perf_counter() - start > args.seconds:
                result["rows"].append(row_of(chosen, density) | {"error": "no time left"})
                continue
            waiting.append(run.row(chosen, density, dense, pool))
            result["rows"] += [done.result() for done in waiting if done.done()]
            waiting = [one for one in waiting if not one.done()]
            write(result, args.out, quiet=True)
        result["rows"] += [done.result() for done in waiting]
    result["wall_seconds"] = time.perf_counter() - start
    return result


def row_of(chosen: Method, density: float) -> dict[str, Any]:
    return {"method": chosen.name, "asked_density": None if chosen.fixed else density, "note": chosen.note}


class Sweep:
    """The pipeline, its prompts, and calls recorded from its dense run."""

    def __init__(self, pipe: Any, args: argparse.Namespace) -> None:
        self.pipe, self.args = pipe, args
        self.prompts = DEFAULT_PROMPTS[: args.clips]
        self.metrics = find_metrics(METRIC_NAMES)
        self.arguments = call_arguments(
            pipe, width=args.size, height=args.size, frames=args.frames, steps=args.steps, guidance=args.guidance
        )
        self.calls: list[AttentionCall] = []
        self.seconds = 0.0
        self.calibration_seconds = 0.0

    def facts(self) -> dict[str, Any]:
        device = torch.cuda.get_device_name() if self.args.device != "cpu" else f"CPU ({platform.machine()})"
        return {
            "device": device,
            "torch": torch.__version__,
            "dtype": self.args.dtype,
            "model": "embedded",
            "steps": self.args.steps,
            "guidance": self.args.guidance,
            "frames": self.args.frames,
            "size": self.args.size,
            "clips": len(self.prompts),
            "seeds": "0, 1, 2... by prompt",
            "command": " ".join(["python", *sys.argv]),
        }

    def dense(self, record: bool = True) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Dense clips, once; the recording of a few calls is a run of its own on two prompts."""
        clips = self.generate(self.prompts)
        if not record:
            return clips
        steps = sorted({max(1, self.args.steps * third // 10) for third in (3, 6, 9)})

        def keep(_: str, call: AttentionCall) -> None:
            if call.step.index in steps and call.step.branch != "uncond":
                q, k, v = (x.clone() for x in (call.q, call.k, call.v))
                self.calls.append(replace(call, q=q, k=k, v=v))

        with patch(self.pipe, "dense") as handle, handle.observe(keep):
            seconds = self.seconds
            self.generate(self.prompts[:2])
            self.seconds = seconds
        return clips

    def calibration(self, recipe: Recipe) -> CalibrationArtifact:
        """Plans for a recipe; the axis orders of an earlier one are measured again."""
        start = time.perf_counter()
        arguments = {**self.arguments, "output_type": "latent"}
        plans = calibrate(self.pipe, CALIBRATION_PROMPTS, recipe, generate_kwargs=arguments, buckets=6)
        self.calibration_seconds = time.perf_counter() - start
        return plans

    def generate(self, prompts: tuple[str, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """uint8 frames and final latents of every prompt."""
        clips = []
        self.seconds = 0.0
        last: list[torch.Tensor] = []

        def keep(_pipe: Any, _step: int, _timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
            last[:] = [state["latents"]]
            return state

        for first in range(0, len(prompts), self.args.batch):
            part = list(prompts[first : first + self.args.batch])
            generators = [torch.Generator().manual_seed(first + n) for n in range(len(part))]
            start = time.perf_counter()
            output = self.pipe(
                prompt=part, generator=generators, output_type="np", callback_on_step_end=keep, **self.arguments
            )
            self.seconds += time.perf_counter() - start
            latents = last[0].float().cpu()
            for frames, latent in zip(output.frames, latents, strict=True):
                clips.append((to_uint8(as_video(frames)), latent))
        return clips

    def row(
        self,
        chosen: Method,
        density: float,
        dense: list[tuple[torch.Tensor, torch.Tensor]],
        pool: ThreadPoolExecutor,
    ) -> Future[dict[str, Any]]:
        """Generate under one recipe; its metrics are taken while the next one generates."""
        row = row_of(chosen, density)
        try:
            recipe = at_density(chosen, density, self.calls)
            row["recipe"] = recipe.to_dict()
            plans = self.calibration(recipe) if chosen.calibrated else None
            with patch(self.pipe, recipe, calibration=plans) as handle:
                clips = self.generate(self.prompts)
                summary = handle.summary()
            row |= {
                "density": summary.density,
                "mean_density": summary.mean_density,
                "nan_calls": summary.nan_calls,
                "plans_per_layer": sum(layer.plans_made for layer in summary.layers) / len(summary.layers),
                "dense_calls": dict(summary.dense_calls),
                "backends": dict(summary.backends),
                "seconds": self.seconds,
                "plan_seconds": summary.plan_seconds,
                "sparse_seconds": summary.sparse_seconds,
                "dense_seconds": summary.dense_seconds,
            } | ({"calibration_seconds": self.calibration_seconds} if plans is not None else {})
        except Exception as error:  # the next method goes on
            row["error"] = f"{type(error).__name__}: {error}"
            row["traceback"] = traceback.format_exc()[-2000:]
            clips = []
        text = row.get("error") or f"{self.seconds:.1f} s, density {row['density'] or 1.0:.3f}"
        print(f"{chosen.name} at {density}: {text}", flush=True)
        return pool.submit(self.measured, row, clips, dense)

    def measured(self, row: dict[str, Any], clips: list[Any], dense: list[Any]) -> dict[str, Any]:
        """The row with its metrics, clip by clip and as intervals."""
        values: dict[str, list[float]] = {name: [] for name in METRIC_NAMES}
        for (frames, latents), (exact, exact_latents) in zip(clips, dense, strict=False):
            pair = ClipPair(exact, frames, 16.0, exact_latents, latents)
            for name, found in measure(pair, self.metrics).items():
                if found.value is not None:
                    values[name].append(found.value)
        row["clips"] = {name: [number_to_json(x) for x in numbers] for name, numbers in values.items()}
        row["metrics"] = {name: bootstrap_mean(numbers).to_json() for name, numbers in values.items() if numbers}
        return row


def merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One result, rows by method and falling density."""
    order = {name: n for n, name in enumerate(parts[0]["order"])}
    rows = [row for part in parts for row in part["rows"]]
    rows.sort(key=lambda row: (order.get(row["method"], len(order)), -(row["asked_density"] or 2.0)))
    walls = [part["wall_seconds"] for part in parts if "wall_seconds" in part]
    return {**parts[0], "rows": rows, "wall_seconds": max(walls, default=None)}


def write(result: dict[str, Any], path: Path, quiet: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    if not quiet:
        show(result)


def show(result: dict[str, Any]) -> None:
    """A table for the terminal."""
    print(
        f"{'method':<19}{'asked':>6}{'density':>9}{'PSNR':>8}{'low':>7}{'high':>7}{'SSIM':>8}{'flicker':>9}{'lat.MSE':>9}"
        f"{'plans':>7}{'plan s':>8}"
    )
    for row in result["rows"]:
        asked = "-" if row["asked_density"] is None else f"{row['asked_density']:.2f}"
        if "error" in row or not row.get("metrics"):
            print(f"{row['method']:<19}{asked:>6}  {row.get('error', 'no clips')[:90]}")
            continue
        psnr, ssim, flicker, latent = (row["metrics"][name] for name in METRIC_NAMES)
        density = "-" if row["density"] is None else f"{row['density']:.3f}"
        ends = [f"{float(psnr[key]):.2f}" for key in ("mean", "low", "high")]
        print(
            f"{row['method']:<19}{asked:>6}{density:>9}{ends[0]:>8}{ends[1]:>7}{ends[2]:>7}"
            f"{float(ssim['mean']):>8.4f}{float(flicker['mean']):>9.3f}{float(latent['mean']):>9.4f}"
            f"{row.get('plans_per_layer', 0):>7.1f}{row.get('plan_seconds', 0.0):>8.2f}"
        )


if __name__ == "__main__":
    main()
