"""One attention call from Python on a GPU: what it takes where the host may be slower than the kernel.

    python -m benchmarks.called [--length 8192] [--heads 12] [--density 0.1] [--json called.json]

Calls follow each other without a wait, in turns with dense attention; a turn is a tenth of a second. ``host`` is the
time until a call returns, ``ms`` the time a call takes of a queue of them: the larger of the host's and the GPU's.
``kernel`` is the operator with its lists at hand, the others are calls of a patched layer whose plan is kept. The
kernel's output is compared with dense attention under the same blocks, in float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dit_accel import presets
from dit_accel.call import AttentionCall, AttentionInputs
from dit_accel.cli.environment import environment
from dit_accel.engine import Engine
from dit_accel.kernels import BlockMask, block_sparse_attention
from dit_accel.layout import StepContext, TokenLayout
from dit_accel.run import Run

DIM, SPAN, TURNS = 128, 0.1, 9
ONE_PLAN: dict[str, Any] = {"schedule": "schedule", "schedule.refresh_every": 1_000_000}
RECIPES: dict[str, dict[str, Any]] = {"layer, mass": {}, "layer, mass with means": {"means": True}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192, help="a multiple of 1,024: rows of 32 x 32 tokens")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="where the figures go")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, asked.length, asked.heads, DIM, dtype=torch.bfloat16, device=device) for _ in range(3))
    kernel, error = kernel_call(q, k, v, asked.density)
    calls: dict[str, Callable[[], Any]] = {"dense": lambda: dense(q, k, v), "kernel": kernel}
    calls |= {name: layer_call(q, k, v, asked.density, more) for name, more in RECIPES.items()}
    with torch.no_grad():
        for call in calls.values():
            for _ in range(20):
                call()
        turns = [{name: timed(call) for name, call in calls.items()} for _ in range(TURNS)]
    found = {}
    for name in calls:
        ms, host = (statistics.median(turn[name][n] for turn in turns) for n in range(2))
        found[name] = {"ms": ms, "host": host}
        print(f"{name:24s} {ms:.3f} ms, host {host:.3f} ms")
    print(f"error of the kernel {error:.2e}")
    if asked.json is not None:
        said = {"length": asked.length, "heads": asked.heads, "density": asked.density, "error": error, "calls": found}
        asked.json.write_text(json.dumps({**environment(device), **said}, indent=1) + "\n", encoding="utf-8")


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch's attention, in the layout that models hand on."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def kernel_call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, density: float
) -> tuple[Callable[[], torch.Tensor], float]:
    """The operator under random lists, and its relative error in the first head."""
    length, heads = q.shape[1:3]
    blocks = torch.rand(1, heads, -(-length // 128), -(-length // 64), device=q.device)
    keep = blocks <= blocks.kthvalue(max(1, round(density * blocks.shape[3])), -1, keepdim=True).values
    mask = BlockMask.from_dense(keep, 128, 64, length, length)

    def call() -> torch.Tensor:
        return block_sparse_attention(q, k, v, mask)

    made = call()[:, :, :1].float()
    seen = keep[:, :1].repeat_interleave(128, 2).repeat_interleave(64, 3)
    one = (x[:, :, :1].transpose(1, 2).float() for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*one, attn_mask=seen).transpose(1, 2)
    return call, float((made - expected).norm() / expected.norm())


def layer_call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, density: float, more: dict[str, Any]
) -> Callable[[], Any]:
    """A patched layer's call, of one run whose plan is kept."""
    grid = (q.shape[1] // 1024, 32, 32)
    recipe = presets.resolve("mass", density=density, **more).with_fields(ONE_PLAN)
    engine, run, layout = Engine(recipe, ["layer"], "auto", 0), Run(), TokenLayout(grid, 0, q.shape[1])
    inputs, forwards = AttentionInputs(q, k, v), iter(range(1, 1 << 30))

    def call() -> Any:
        step = StepContext(forward_id=next(forwards))
        return engine.attend(AttentionCall.of(0, inputs, layout, step, run), lambda: dense(q, k, v))

    return call


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds a call: of the queue, and until it returns."""
    torch.cuda.synchronize()
    number, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < SPAN:
        call()
        number += 1
    host = time.perf_counter() - begin
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / number * 1e3, host / number * 1e3


if __name__ == "__main__":
    main()
