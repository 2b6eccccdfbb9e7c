"""INT8 attention and planning against what they were before, in turns in one run of less than five minutes.

    python -m benchmarks.card_times [--tokens 32760] [--heads 12] [--density 0.2] [--seconds 200] [--json out.json]

On Hopper the portable kernels are timed, as Triton compiles them for it (wgmma): they stand in for cards that are not
here, and are named so. Beside each time stands the relative error of a short call against float32 attention under the
same blocks. Planning is a call of the engine as it is, and with Triton's own launches in place of
kept ones: the host's time of a call, without waiting for the GPU, and the time of a replay of its CUDA graph.
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

from dit_accel import presets
from dit_accel.call import AttentionCall, AttentionInputs
from dit_accel.engine import Engine
from dit_accel.kernels import BlockMask, block_sparse_attention
from dit_accel.kernels.attention.triton.forward import forward
from dit_accel.kernels.common.compiled import KeptKernel
from dit_accel.kernels.quantized.triton.forward import quantized_forward
from dit_accel.kernels.quantized.triton.prologue import quantize_inputs
from dit_accel.layout import StepContext, TokenLayout
from dit_accel.run import Run

from .captured_calls import captured

FLUX = TokenLayout((1, 64, 64), 512, 4608)
Call = Callable[[], Any]


def attention_calls(
    tokens: int, heads: int, dim: int, density: float
) -> tuple[dict[str, Call], Callable[[str], torch.Tensor]]:
    """The calls by name, and the float32 output of a call of this name."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, heads, dim, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(3)
    )
    rows = torch.randperm(tokens, device="cuda", generator=generator).int().expand(1, 1, -1).contiguous()
    found: dict[str, Call] = {}
    scale = dim**-0.5
    masks = {}
    for block in ((128, 64), (64, 64)):
        counts = [-(-tokens // n) for n in block]
        keep = torch.rand(1, heads, *counts, device="cuda", generator=generator) < density
        keep[..., 0] = True
        masks[block] = BlockMask.from_dense(keep, *block, tokens, tokens)
        for order in (None, rows):
            mask = masks[block]
            name = f"{block[0]}x{block[1]} {'in order' if order is None else 'permuted'}"
            found[f"bf16 {name}"] = lambda mask=mask, order=order: forward(q, k, v, mask, order, None, scale)[0]
            for label, settings in {
                "int8": {"half_sums": False},
                "int8 half sums": {"half_sums": True},
                "int8 half sums rotated": {"half_sums": True, "rotate": True},
            }.items():

                def ready(mask: BlockMask = mask, order: Any = order, settings: Any = settings) -> Any:
                    return quantize_inputs(
                        q, k, v, mask.block_q, mask.block_k, rows=order, key_scales="thread", **settings
                    )

                def whole(mask: BlockMask = mask, order: Any = order, ready: Any = ready) -> torch.Tensor:
                    return quantized_forward(ready(), mask, order, None, scale, heads, q.dtype)[0]

                made = ready()
                found[f"{label} {name}"] = whole
                found[f"{label} {name}, quantised before"] = lambda mask=mask, order=order, made=made: (
                    quantized_forward(made, mask, order, None, scale, heads, q.dtype)[0]
                )

    def exact(name: str) -> torch.Tensor:
        mask = masks[(128, 64) if "128x64" in name else (64, 64)]
        order = rows if "permuted" in name else None
        out = block_sparse_attention(
            q.float(), k.float(), v.float(), mask, rows=order, scale=scale, backend="torch"
        )  # fmt: skip
        assert isinstance(out, torch.Tensor)
        return out

    return found, exact


def planning_calls(heads: int) -> dict[str, Call]:
    """Calls of FLUX at 1,024 x 1,024, with kept launches and with Triton's own."""
    q, k, v = (torch.randn(1, FLUX.seq_len, heads, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    found: dict[str, Call] = {}
    kept = KeptKernel._launch

    def plain(self: KeptKernel, grid: Any, *args: Any, **named: Any) -> None:
        self.kernel[grid](*args, **named)

    for preset, options, changes in (
        ("pooled", {}, {}), ("pooled", {"refresh_every": 1_000_000}, {}), ("mass", {}, {"schedule": "schedule"}),
    ):  # fmt: skip
        engine = Engine(presets.resolve(preset, **options).with_fields(changes), ["layer"], "auto", 0)
        run, forwards = Run(), iter(range(1, 1 << 40))

        def call(engine: Engine = engine, run: Run = run, forwards: Any = forwards) -> torch.Tensor:
            step = StepContext(forward_id=next(forwards))
            return engine.attend(AttentionCall.of(0, AttentionInputs(q, k, v), FLUX, step, run), lambda: q)

        def unkept(call: Call = call) -> torch.Tensor:
            KeptKernel._launch = plain  # type: ignore[method-assign]
            try:
                return call()
            finally:
                KeptKernel._launch = kept  # type: ignore[method-assign]

        name = f"{preset}{', one plan' if options else ''}"
        found[name], found[f"{name}, Triton's launches"] = call, unkept
    # Under names of their own: the calls above read q, k and v when they are made.
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    found["dense"] = lambda: torch.nn.functional.scaled_dot_product_attention(*heads_first)
    return found


def device_ms(call: Call, times: int = 5) -> float:
    """Of the GPU, per call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / times


def host_us(call: Call, times: int = 20) -> float:
    """Until the calls are queued."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(times):
        call()
    spent = time.perf_counter() - begin
    torch.cuda.synchronize()
    return spent / times * 1e6


def in_turns(calls: dict[str, Call], measure: Callable[[Call], float], seconds: float) -> dict[str, float]:
    """Medians; every round measures each call once, from another one on."""
    for call in calls.values():
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    found: dict[str, list[float]] = {name: [] for name in calls}
    names, begin, rounds = list(calls), time.monotonic(), 0
    while time.monotonic() - begin < seconds or rounds < 3:
        for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
            found[name].append(measure(calls[name]))
        rounds += 1
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_760)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--seconds", type=float, default=200, help="in all, besides compiling")
    parser.add_argument("--json", type=Path, help="where the figures go")
    asked = parser.parse_args()
    if asked.tokens < 128 or asked.heads < 1 or not 0.0 < asked.density <= 1.0:
        parser.error("--tokens must be at least 128, --heads at least 1, and --density in (0, 1].")
    rows: dict[str, dict[str, float]] = {}
    print(torch.cuda.get_device_name(), "compute capability", torch.cuda.get_device_capability())
    with torch.no_grad():
        planning = planning_calls(24)
        host = in_turns(planning, host_us, asked.seconds / 8)
        called = in_turns(planning, device_ms, asked.seconds / 8)
        replays = {name: captured(call, warm_ups=3).replay for name, call in planning.items()}
        replayed = in_turns(replays, device_ms, asked.seconds / 8)
        for name in planning:
            rows[f"FLUX 1024: {name}"] = {
                "host_us": host[name], "called_ms": called[name], "replayed_ms": replayed[name]
            }  # fmt: skip
        for dim in (128, 64):
            calls, exact = attention_calls(asked.tokens, asked.heads, dim, asked.density)
            timed = in_turns(calls, device_ms, asked.seconds / 4)
            small, exact = attention_calls(2_000, 2, dim, 0.5)
            for name, ms in timed.items():
                right = exact(name)
                error = (small[name]().float() - right).norm() / right.norm()
                rows[f"d{dim} {name}"] = {"ms": ms, "error": float(error)}
    for name, row in rows.items():
        print(f"{name:62s} " + "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
