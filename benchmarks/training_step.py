"""Time a training step of a real architecture with random weights: dense attention against a trainable recipe.

    python benchmarks/training_step.py --arch wan2.1-1.3b --recipe sla --density 0.05 --json results/training_step.json

Both variants are one model, the dense one with the patch switched off; they alternate. A step is forward,
backward with gradient checkpointing, and AdamW on the attention projections and the recipe's own parameters.
The second table is one attention call alone: its time, and the memory that it keeps for its backward.
The goals, at 32,760 tokens on an H200: a step of `sla` at 5% density at least 1.8x faster than dense, and at most
1.3x of dense flash attention's activation memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import dit_accel
from dit_accel.call import AttentionCall, AttentionInputs
from dit_accel.cli.environment import environment
from dit_accel.cli.options import read_size
from dit_accel.engine import Engine
from dit_accel.layout import StepContext, TokenLayout
from dit_accel.patches.targets import self_attentions, transformers_of
from dit_accel.pipelines.architectures import architecture
from dit_accel.training.config import FinetuneConfig
from dit_accel.training.trainables import Trainables


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def time_steps(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds of a step and peak memory, dense and patched."""
    known = architecture(args.arch)
    width, height = read_size(args.size) if args.size else known.size[:2]
    size = {"width": width, "height": height, "frames": args.frames or known.size[2], "batch": 1}
    model = known.build(dtype=dtype, device=device, layers=args.layers)
    inputs = known.make_inputs(model, **size, dtype=dtype, device=device)
    if device.type == "cuda":
        model.set_attention_backend(args.dense_backend)
    model.enable_gradient_checkpointing()
    model.train()
    handle = dit_accel.patch(model, args.recipe, **({"density": args.density} if args.density else {}))
    attentions = {p: m for _, found, family in transformers_of(model) for p, m in self_attentions(found, family)}
    trained = Trainables(model, handle, attentions, FinetuneConfig())
    optimizer = torch.optim.AdamW(trained.named().values(), lr=1e-6, fused=device.type == "cuda")

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = model(**inputs)[0]
        out.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def finite() -> bool:
        return all(bool(p.isfinite().all()) for p in trained.named().values())

    variants: dict[str, Callable[[], Any]] = {"dense": handle.disabled, "patched": nullcontext}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    memory = dict.fromkeys(variants, 0)
    for repeat in range(args.repeats + 2):
        for name, context in variants.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            with context():
                start = clock(device)
                step()
                end = clock(device)
            if repeat >= 2:  # kernels are compiled in the first
                seconds[name].append(end - start)
                memory[name] = max(memory[name], peak(device))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds": seconds,
        "median_s": medians,
        "speedup": medians["dense"] / medians["patched"],
        "peak_gib": {name: value / 2**30 for name, value in memory.items()},
        "peak_ratio": memory["patched"] / memory["dense"] if memory["dense"] else None,
        "finite": finite(),
        "density": handle.summary().density,
    }


def time_call(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """One attention call with backward: seconds, and bytes between forward and backward."""
    grid = tuple(args.grid)
    layout = TokenLayout(grid, 0, grid[0] * grid[1] * grid[2])
    recipe = dit_accel.presets.resolve(args.recipe, **({"density": args.density} if args.density else {}))
    engine = Engine(recipe, ["layer"], "auto", 0)
    if recipe.compensate.is_learned:
        engine.learned[0] = recipe.compensate.build(args.heads, args.head_dim).to(device)
    shape = (1, layout.seq_len, args.heads, args.head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))

    def dense() -> torch.Tensor:
        anchor = sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if device.type == "cuda" else nullcontext()
        with anchor:
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    def patched() -> torch.Tensor:
        inputs = AttentionInputs(q, k, v)
        return engine.attend(AttentionCall.of(0, inputs, layout, StepContext(), engine.run), dense)

    found: dict[str, Any] = {"tokens": layout.seq_len}
    for name, call in {"dense": dense, "patched": patched}.items():
        seconds, kept = [], 0
        for repeat in range(args.repeats + 2):
            before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            start = clock(device)
            out = call()
            kept = (torch.cuda.memory_allocated(device) if device.type == "cuda" else 0) - before
            out.backward(torch.ones_like(out))
            del out  # or the next repeat would replace it, and its bytes would not be seen
            end = clock(device)
            q.grad = k.grad = v.grad = None
            if repeat >= 2:
                seconds.append(end - start)
        found[name] = {"median_s": statistics.median(seconds), "kept_mib": kept / 2**20}
    found["speedup"] = found["dense"]["median_s"] / found["patched"]["median_s"]
    if found["dense"]["kept_mib"]:
        # The inputs stay for the backward too; both variants keep the same ones.
        inputs = 3 * q.numel() * q.element_size() / 2**20
        found["activation_ratio"] = (found["patched"]["kept_mib"] + inputs) / (found["dense"]["kept_mib"] + inputs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="wan2.1-1.3b")
    parser.add_argument("--recipe", default="sla")
    parser.add_argument("--density", type=float, help="default: the recipe's")
    parser.add_argument("--size", help="WxH in pixels; default: the model's")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--grid", type=int, nargs=3, default=(21, 30, 52), help="tokens of the single call")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dense-backend", default="_native_cudnn", help="diffusers' name; on a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=("call", "step"), help="one of the two measurements")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    report: dict[str, Any] = {}
    for name, measure in {"call": time_call, "step": time_steps}.items():
        if args.only not in (None, name):
            continue
        try:
            report[name] = measure(args, device, dtype)
        except Exception as error:  # a benchmark run tells all it can
            report[name] = {"error": f"{type(error).__name__}: {error}"}
        print(name, json.dumps(report[name], indent=1))
        if args.json is not None:
            args.json.write_text(json.dumps({**report, **environment(device)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
