"""Every preset and profile on one model: seconds and fidelity of the same clips, by the parts of ``dit-accel verify``.

    python -m benchmarks.verify_presets --model embedded-long --compile --graphs --prompts 8 --out table
    python -m benchmarks.verify_presets --compile --gpus 2 --prompts 8 --out table           # prompts shared out
    python -m benchmarks.verify_presets --methods mass pooled fast --densities 0.3 --quick --device cpu --out small
    python -m benchmarks.verify_presets --show table/table.json

Dense and the rows take turns, clip by clip, in groups of rows (--group), each with dense runs of its own. A run that
was broken off goes on where it was: settings of rows, plans, and every finished clip are in the folder. A row that
cannot run is recorded with its reason, before hours go into the others. Processes share out both: rows while each is
tried, then prompts. --first leaves prompts out that an earlier file has, and --like takes its rows' recipes, so that
``benchmarks/presets_table.py`` can show both as one.

Seconds count where one process has a GPU for itself (--processes 1); the file says how many had. Rank agreement is
Spearman's correlation of the rows' PSNR with that of the fidelity sweep of the small model, at the same density.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dit_accel import CalibrationArtifact, Recipe, accelerate, calibrate, patch
from dit_accel.acceleration.compiled import compile_blocks
from dit_accel.call import AttentionCall
from dit_accel.cli.environment import environment
from dit_accel.cli.settings import Asked
from dit_accel.files import write_text
from dit_accel.parts import Parts
from dit_accel.pipelines import load
from dit_accel.pipelines.builtin import builtins
from dit_accel.pipelines.generate import call_arguments, frames_per_second
from dit_accel.plain_data import as_plain
from dit_accel.quality.card import interval_text
from dit_accel.quality.compare import compare
from dit_accel.quality.frechet import SMALLEST_FRAMES, I3d, find_weights, frechet_distance, video_features
from dit_accel.quality.generation import Generated, generate_clip, shortened
from dit_accel.quality.measurement import MetricUnavailable
from dit_accel.quality.prompts import DEFAULT_PROMPTS
from dit_accel.quality.report import REPORT, read_report
from dit_accel.quality.results import DENSE, ComparisonReport, result_to_json, summary_to_json
from dit_accel.quality.sequence import first_sequence
from dit_accel.quality.turns import LONG_WARM_UP_STEPS

from .fidelity_presets import at_density
from .rank_agreement import agreement, small_ranking
from .verify_rows import REFRESH, REFRESH_DENSITY, Row, all_methods, refresh_name, rows_of

# Prompts for what is fitted or calibrated: none of those that are compared.
OTHER_PROMPTS = (
    "a blue penguin bouncing over a meadow",
    "two red robots flying left in space",
    "a small yellow car standing still in a forest",
)
METRICS = ("psnr", "ssim", "lpips", "flicker")
RESULTS = Path(__file__).parent / "results"
SMALL = (RESULTS / "fidelity_h200.json", RESULTS / "fidelity_h100.json")
# Recorded calls are long: of few layers and steps.
CALLS, AT = 12, (0.3, 0.6, 0.9)
ADVICE = "give another --out"
# Beside the rows' parts: tokens, and arguments of the call.
RUN = "run"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="built-in, folder or hub id")
    parser.add_argument("--methods", nargs="+", default=list(all_methods()), help="rows; default: all")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.3, 0.2, 0.1])
    parser.add_argument("--prompts", type=int, default=8, help="how many, each with a seed of its own")
    parser.add_argument("--first", type=int, default=0, help="of the prompts, to leave out")
    parser.add_argument("--like", type=Path, help="a table.json: rows with its recipes, not fitted anew")
    parser.add_argument("--size", help="WxH; default: the model's")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--compile", action="store_true", help="blocks of both sides")
    parser.add_argument("--graphs", action="store_true", help="blocks of the rows replayed as CUDA graphs")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS), help="of each clip")
    parser.add_argument("--repeat", type=int, default=1, help="timed runs of each clip and row")
    parser.add_argument("--group", type=int, default=12, help="rows that take turns with one dense run")
    parser.add_argument("--processes", type=int, default=1, choices=range(1, 9), help="on each GPU")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--small", type=Path, nargs="*", default=list(SMALL), help="the fidelity sweep to agree with")
    parser.add_argument("--quick", action="store_true", help="small clips of few steps: does every row run?")
    parser.add_argument("--show", type=Path, help="print the tables of a file")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)  # of the rows or prompts, for one process
    parser.add_argument("--prepare", action="store_true", help="try the rows and end, such as beside other work")
    parser.add_argument("--out", type=Path, default=Path("outputs/presets"))
    args = parser.parse_args()
    if args.quick:
        args.size, args.frames, args.steps, args.prompts = "96x96", 9, 4, min(args.prompts, 2)
    if args.show:
        print(shown(json.loads(args.show.read_text())))
    elif args.first >= args.prompts:
        parser.error(f"--first must leave a prompt of --prompts {args.prompts}, got {args.first}")
    elif args.share is not None:
        (prepare_share if args.prepare else run_share)(args)
    else:
        rows = rows_of(args.methods, args.densities)  # an unknown name is found before anything is loaded
        parts = Parts(args.out, ADVICE)
        parts.claim(settings_of(args))
        if any(parts.read(name) is None for name in (RUN, *(row.name for row in rows))):
            launch(args, "--prepare")
        if args.prepare:
            return
        launch(args)
        result = merged(args, rows, parts)
        write_text(args.out / "table.json", json.dumps(result, indent=1) + "\n")
        print(shown(result))


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a clip depends on. Further methods, densities and prompts may come to a folder."""
    names = ("model", "size", "frames", "steps", "guidance", "compile", "graphs", "repeat", "device", "dtype")
    device = torch.cuda.get_device_name() if args.device != "cpu" else "cpu"
    return {name: getattr(args, name) for name in names} | {"on": device, "torch": torch.__version__}


def prompts_of(args: argparse.Namespace) -> list[tuple[str, int]]:
    """Prompts with their seeds."""
    return [(DEFAULT_PROMPTS[n % len(DEFAULT_PROMPTS)], n) for n in range(args.first, args.prompts)]


def opened(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The pipeline, compiled if it is to be, and arguments of its call."""
    pipe = load(args.model, dtype=getattr(torch, args.dtype), device=torch.device(args.device))
    pipe.set_progress_bar_config(disable=True)
    if args.compile:
        compile_blocks(pipe)
    asked = Asked.read(args.size, args.frames, args.steps, args.guidance)
    return pipe, call_arguments(pipe, **asked.settings(pipe, builtins().get(args.model)))


def patched(args: argparse.Namespace, parts: Parts, pipe: Any, row: str) -> Any:
    """A row's patch as it was prepared."""
    if row == DENSE:
        return patch(pipe, DENSE)
    found = parts.read(row)
    plans = None if found["plans"] is None else CalibrationArtifact.load(args.out / found["plans"])
    return accelerate(pipe, Recipe.from_dict(found["recipe"]), graphs=args.graphs, calibration=plans)


def processes(args: argparse.Namespace) -> int:
    """How many share the work; a prompt is one's own."""
    return min(args.processes * args.gpus, args.prompts - args.first)


def prepare_share(args: argparse.Namespace) -> None:
    """Fit, calibrate and try rows once, so that all processes run the very same recipes."""
    parts, rows = Parts(args.out, ADVICE), rows_of(args.methods, args.densities)[args.share :: processes(args)]
    pipe, arguments = opened(args)
    if args.share == 0:
        sequence = first_sequence(pipe, OTHER_PROMPTS[0], arguments)
        parts.write(RUN, {"sequence": None if sequence is None else asdict(sequence), "call": as_plain(arguments)})
    rows = [row for row in rows if parts.read(row.name) is None]
    known = {} if args.like is None else recipes_of(json.loads(args.like.read_text()))
    fitted = any(row.method.is_fitted and row.name not in known for row in rows)
    calls = recorded(pipe, arguments) if fitted else []
    short = shortened(pipe, arguments, min(LONG_WARM_UP_STEPS, args.steps))
    for row in rows:
        found: dict[str, Any] = {"recipe": None, "plans": None, "failed": None}
        try:
            if row.name in known:
                recipe = Recipe.from_dict(known[row.name])
            elif row.density is None:
                recipe = row.method.build()
            else:
                recipe = at_density(row.method, row.density, calls)
            found["recipe"] = recipe.to_dict()
            plans = None
            if row.method.calibrated:
                path = args.out / "plans" / f"{row.name}.safetensors"
                given = {**arguments, "output_type": "latent"}
                plans = calibrate(pipe, OTHER_PROMPTS, recipe, out=path, generate_kwargs=given, buckets=6)
                found["plans"] = str(path.relative_to(args.out))
            with accelerate(pipe, recipe, graphs=args.graphs, calibration=plans):
                generate_clip(pipe, OTHER_PROMPTS[0], 0, short)
        except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:  # the other rows go on
            found["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        parts.write(row.name, found)
        print(f"{row.name}: {found['failed'] or 'ready'}", file=sys.stderr, flush=True)


def recipes_of(table: Mapping[str, Any]) -> dict[str, Any]:
    """Recipes of a file's rows; the first files kept none."""
    return {row["row"]: row["recipe"] for row in table["rows"] if isinstance(row["recipe"], dict)}


def recorded(pipe: Any, arguments: Mapping[str, Any]) -> list[AttentionCall]:
    """Some calls of a dense run, to fit settings on."""
    calls: list[AttentionCall] = []
    steps = int(arguments["num_inference_steps"])
    at = {min(steps - 1, max(1, round(share * steps))) for share in AT}
    with patch(pipe, "dense") as handle:
        every = max(1, len(handle.summary().layers) * len(at) // CALLS)

        def keep(_: str, call: AttentionCall) -> None:
            if call.step.index in at and call.step.branch != "uncond" and call.layer % every == 0:
                calls.append(replace(call, q=call.q.clone(), k=call.k.clone(), v=call.v.clone()))

        with handle.observe(keep):
            generate_clip(pipe, OTHER_PROMPTS[0], 0, arguments)
    return calls


def launch(args: argparse.Namespace, *what: str) -> None:
    """A process a share; those on one GPU run beside each other."""
    children = []
    # Threads of several processes on one core wait for each other in a loop.
    threads = str(max(1, (os.cpu_count() or 1) // processes(args)))
    for share in range(processes(args)):
        place = {"OMP_NUM_THREADS": threads}
        if args.device != "cpu":
            place["CUDA_VISIBLE_DEVICES"] = visible(share % args.gpus)
        command = [sys.executable, "-m", "benchmarks.verify_presets", *sys.argv[1:], "--share", str(share), *what]
        children.append(subprocess.Popen(command, env={**os.environ, **place}))
    codes = [child.wait() for child in children]
    if any(codes):
        raise SystemExit(f"Processes ended with {codes}; the same command goes on where they were.")


def visible(number: int) -> str:
    """A GPU of those that this process sees, as its children name it."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return seen.split(",")[number] if seen else str(number)


def groups_of(args: argparse.Namespace, parts: Parts) -> list[list[Row]]:
    """The rows that can run, in groups."""
    rows = [row for row in rows_of(args.methods, args.densities) if parts.read(row.name)["failed"] is None]
    return [rows[first : first + args.group] for first in range(0, len(rows), args.group)]


def run_share(args: argparse.Namespace) -> None:
    """The prompts of one process, under all rows. A folder is of one prompt and group."""
    parts = Parts(args.out, ADVICE)
    pipe, arguments = opened(args)
    network, _ = i3d(args.device)
    warm: set[str] = set()
    broken: list[str] = []
    for prompt, seed in prompts_of(args)[args.share :: processes(args)]:
        for rows in groups_of(args, parts):
            own = Parts(folder_of(args, seed, rows), ADVICE)
            own.claim({"prompt": prompt, "rows": {row.name: parts.read(row.name) for row in rows}})
            if finished(own, rows):
                continue

            def keep(name: str, _prompt: str, _seed: int, made: Generated, own: Parts = own) -> None:
                if network is not None and len(made.frames) >= SMALLEST_FRAMES:
                    own.write(f"features-{name}", features(network, made).tolist())

            try:
                compare(
                    pipe,
                    {row.name: row.name for row in rows},
                    [prompt],
                    [seed],
                    metrics=args.metrics,
                    generate_kwargs=arguments,
                    out=own.folder,
                    fps=frames_per_second(pipe),
                    patch=partial(patched, args, parts),
                    dense_attention_clips=0,
                    # A short run goes before each run of what is compiled.
                    warm_up=rows[0].name not in warm and not args.compile,
                    warm_up_steps=LONG_WARM_UP_STEPS,
                    repeat=args.repeat,
                    pictures=False,
                    parts=own,
                    on_clip=keep,
                    progress=lambda line: print(line, file=sys.stderr, flush=True),
                )
            except RuntimeError:  # such as memory that ran out: the other groups go on
                traceback.print_exc()
                broken.append(own.folder.name)
            warm.add(rows[0].name)
    if broken:
        raise SystemExit(f"Not finished: {', '.join(broken)}.")


def finished(own: Parts, rows: Sequence[Row]) -> bool:
    """Whether a folder has its report, and that has all rows."""
    path = own.folder / REPORT
    return path.exists() and set(read_report(path).recipes) == {row.name for row in rows}


def folder_of(args: argparse.Namespace, seed: int, rows: Sequence[Row]) -> Path:
    """Where the clips of a prompt under a group of rows are."""
    return args.out / "clips" / f"{seed:03d}-{rows[0].name}-{len(rows)}"


def merged(args: argparse.Namespace, rows: Sequence[Row], parts: Parts) -> dict[str, Any]:
    """One file of all processes' clips."""
    _, missing = i3d("cpu")
    found: list[dict[str, Any]] = []
    for group in groups_of(args, parts):
        folders = [folder_of(args, seed, group) for _, seed in prompts_of(args)]
        reports = [read_report(folder / REPORT) for folder in folders]
        whole = joined(reports)
        dense = features_of(folders, DENSE)
        dense_seconds = whole.summary(DENSE).total_seconds.to_json()
        for row in group:
            fast = features_of(folders, row.name)
            fvd = None if dense is None or fast is None else frechet_distance(dense, fast)
            ran = summary_to_json(whole.summary(row.name))
            found.append(
                {"row": row.name, "method": row.method.name, "asked_density": row.density}
                | ran
                | {"dense_seconds": dense_seconds, "fvd": fvd}
                | parts.read(row.name)  # the whole recipe in place of its name
                | {"each": [result_to_json(one) for one in whole.results if one.recipe == row.name]}
            )
    failed = {row.name: reason for row in rows if (reason := parts.read(row.name)["failed"])}
    facts = {
        **environment(torch.device(args.device)),
        "settings": settings_of(args),
        **parts.read(RUN),
        "prompts": args.prompts - args.first,
        "processes_on_a_gpu": -(-processes(args) // args.gpus),
        "gpus": args.gpus,
        "command": " ".join(["python", "-m", "benchmarks.verify_presets", *sys.argv[1:]]),
    }
    return {
        "facts": facts,
        "fvd_missing": missing,
        "rows": found,
        "failed": failed,
        "agreement": agreements(found, args.small),
    }


def joined(reports: Sequence[ComparisonReport]) -> ComparisonReport:
    """One report of the same rows on all prompts."""
    return replace(reports[0], results=tuple(result for report in reports for result in report.results))


def i3d(device: str) -> tuple[I3d | None, str | None]:
    """The network whose features are compared, or why there is none."""
    try:
        return I3d.read(find_weights()).to(device), None
    except MetricUnavailable as error:
        return None, str(error)


def features(network: I3d, made: Generated) -> torch.Tensor:
    """``[400]`` of a clip in 8 bits."""
    return video_features(network, made.frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1)[0]


def features_of(folders: Sequence[Path], name: str) -> torch.Tensor | None:
    """``[clips, 400]`` of a row; None where they are not all there, or too few for a distance."""
    found = [Parts(folder, ADVICE).read(f"features-{name}") for folder in folders]
    return None if None in found or len(found) < 2 else torch.tensor(found, dtype=torch.float64)


def agreements(rows: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> dict[str, Any]:
    """Rank agreement with the small model, by density."""
    small = small_ranking(files)
    found: dict[str, Any] = {}
    for density in sorted({row["asked_density"] for row in rows if row["asked_density"] is not None}, reverse=True):
        here = {
            row["method"]: float(row["metrics"]["psnr"]["mean"])
            for row in rows
            if row["asked_density"] == density and "psnr" in row["metrics"]
        }
        both = agreement(here, small.get(density, {}))
        found[f"{density:g}"] = None if both is None else asdict(both)
    return found


def shown(result: Mapping[str, Any]) -> str:
    """All tables in Markdown."""
    heads = ["row", "mean density", "dense, s", "seconds", "times as fast", *METRICS, "FVD", "computed"]
    lines = [_line(heads), "|" + "---|" * len(heads)]
    for row in sorted(result["rows"], key=lambda row: -_psnr(row)):
        share, fvd = row["computed_share"], row["fvd"]
        lines.append(
            _line(
                [
                    row["row"],
                    f"{row['density']['mean']:.3f}",
                    f"{row['dense_seconds']['median']:.2f}",
                    f"{row['total_seconds']['median']:.2f}",
                    interval_text(row["speedup"], 2, "median"),
                    *(_mean(row["metrics"].get(name), 4 if name in ("ssim", "lpips") else 2) for name in METRICS),
                    "-" if fvd is None else f"{fvd:.1f}",
                    "-" if share is None else f"{share['mean']:.2f}",
                ]
            )
        )
    facts = result["facts"]
    lines += ["", f"{facts['device']['name']}, {facts['processes_on_a_gpu']} processes on a GPU: `{facts['command']}`"]
    lines += [f"FVD is missing: {result['fvd_missing']}"] if result["fvd_missing"] else []
    lines += [f"{name} did not run: {reason}" for name, reason in result["failed"].items()]
    for density, both in result["agreement"].items():
        said = (
            "too few methods"
            if both is None
            else f"{both['correlation']:.2f} ({both['low']:.2f} to {both['high']:.2f}, {both['count']} methods)"
        )
        lines.append(f"ranked as on the small model at {density}: Spearman {said}")
    return "\n".join([*lines, *_lasting(result["rows"])])


def _lasting(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Does a plan of one step last? Fidelity by the steps that a plan serves."""
    known = {row["method"]: row for row in rows}
    aged = [(age, known[refresh_name(age)]) for age in REFRESH if refresh_name(age) in known]
    if not aged:
        return []
    lines = ["", f"A plan at density {REFRESH_DENSITY:g} serves", "", "| steps | PSNR, dB | SSIM |", "|---|---|---|"]
    for age, row in aged:
        steps = "all" if refresh_name(age) == "plan-once" else str(age)
        lines.append(_line([steps, _mean(row["metrics"].get("psnr"), 2), _mean(row["metrics"].get("ssim"), 4)]))
    return lines


def _psnr(row: Mapping[str, Any]) -> float:
    return float(row["metrics"]["psnr"]["mean"]) if "psnr" in row["metrics"] else float("-inf")


def _mean(found: Mapping[str, Any] | None, digits: int) -> str:
    return "-" if found is None else interval_text(found, digits, "mean")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
