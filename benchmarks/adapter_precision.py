"""A shipped adapter in other numbers than it was trained in: its distance to the dense model, beside its own.

Clips of tuning prompts with each adapter of the embedded model, in the numbers it was trained in and in each
``--precision``, by PSNR to the dense model's clip from the same noise.

    python benchmarks/adapter_precision.py --clips 8 --size 192 --frames 29 --out adapters.json
    python benchmarks/adapter_precision.py --clips 2 --size 128 --frames 17 --out adapters_cpu.json

On a GPU give ``--backend torch``: 8-bit kernels need blocks of 32, and these adapters have blocks of 16.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from judged_calls import report
from reuse_front import TUNING_PROMPTS

import dit_accel
from dit_accel.pipelines.companion import adapters
from dit_accel.pipelines.embedded_model import load_embedded
from dit_accel.quality.generation import generate_clip
from dit_accel.quality.pixel import Psnr
from dit_accel.quality.video import ClipPair

FIRST_SEED = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--frames", type=int, default=29)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--adapters", nargs="+", default=sorted(adapters()))
    parser.add_argument("--precision", nargs="+", default=["int8"])
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    begin = time.monotonic()
    pipe = load_embedded(torch.bfloat16 if args.device == "cuda" else torch.float32).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    asked = {"width": args.size, "height": args.size, "num_frames": args.frames, "num_inference_steps": args.steps}

    def clip(number: int) -> torch.Tensor:
        return generate_clip(pipe, TUNING_PROMPTS[number], FIRST_SEED + number, asked).frames

    dense = [clip(number) for number in range(args.clips)]
    found: dict[str, Any] = {}
    for name in args.adapters:
        own = None
        for precision in ("model", *args.precision):
            with dit_accel.load_adapter(pipe, name) as handle:
                recipe = handle.recipe.with_fields({"precision": precision})
            with dit_accel.load_adapter(pipe, name, recipe=recipe, backend=args.backend):
                psnr = [Psnr()(ClipPair(reference, clip(number))) for number, reference in enumerate(dense)]
            mean = sum(psnr) / len(psnr)
            own = mean if own is None else own
            found[f"{name}, {precision}"] = {"psnr": psnr, "mean": mean, "change": mean - own}
            print(name, precision, json.dumps(found[f"{name}, {precision}"]), flush=True)
    report(found, args, begin)


if __name__ == "__main__":
    main()
