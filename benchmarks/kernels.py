"""Time the attention kernels on one GPU, outputs (and with the backward dq) checked against fp64 in the same run.

    python benchmarks/kernels.py --json out.json [--sections all] [--seconds 240] [--lengths 32768]

Random normal bf16 inputs, batch 1, 12 heads, head dim 128, random BlockMask. "eff" counts the kept blocks'
operations only (4 H S^2 D density, and 3.5 times that with the backward). Anchors of the same run: cuDNN and,
where it is installed, flash-attn-4, dense and, in turns with ours, with the same masks. Times, medians:

    ms         a call from Python, the L2 cache cleared, with rests between calls.
    device_ms  its launches replayed as a CUDA graph, one replay after the other.
    load_ms    the same replays in random order with all calls of the comparison, the GPU always busy.
    alone_ms   of calls quantised or permuted and what they are compared with: one over and over, the GPU always
               busy. The clock is then what this call's power allows, as in a model whose attention is of one kind.
"""

# ruff: noqa: B023 - every closure is called before its loop moves on
from __future__ import annotations

import argparse
import contextlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import triton
from kernel_carried import section_carried
from kernel_cases import (
    BLOCKS,
    DENSITIES,
    PREFIXES,
    Report,
    checked,
    dense_backward_cudnn,
    dense_cudnn,
    dense_fa4,
    device_ms,
    inputs,
    median_ms,
    operations,
    oracle_error,
    query_gradient_error,
    random_mask,
    sla_error,
    sparse_fa4,
)
from kernel_pairs import section_pairs, section_pairs_in_8_bits
from kernel_rows import section_rows
from kernel_steps import section_steps

from dit_accel.kernels import BlockMask, QuantizedInputs, block_sparse_attention


def section_forward(report: Report, args: argparse.Namespace) -> None:
    """Ours (the backend that is chosen by itself) and flash-attn-4 in turns; dense anchors."""
    for length in args.lengths:
        q, k, v = inputs(length, args.heads, args.head_dim)
        full = 4 * args.heads * length * length * args.head_dim
        for block_q, block_k in BLOCKS[: 2 if length == args.lengths[0] else 1]:
            for density in DENSITIES:
                mask = random_mask(args.heads, length, block_q, block_k, density)
                report.turns(
                    {
                        "ours": lambda: lambda: block_sparse_attention(q, k, v, mask),
                        "fa4": lambda: sparse_fa4(q, k, v, mask),
                    },
                    checked(q, k, v, mask),
                    "fa4",
                    operations(q, mask),
                    section="forward",
                    S=length,
                    block=f"{block_q}x{block_k}",
                    density=density,
                )
        for name, make in (("cudnn dense", dense_cudnn), ("fa4 dense", dense_fa4)):

            def dense() -> dict[str, object]:
                ms = median_ms(make(q, k, v))
                return {"ms": ms, "eff": full / ms / 1e9}

            report.add(dense, section="forward", op=name, S=length)


def section_sla(report: Report, args: argparse.Namespace) -> None:
    """SLA with its routing at 5%: forward, and forward with backward, over cuDNN dense in the same run."""
    from dit_accel.kernels.linear.api import add_linear_branch, plus_linear_branch
    from dit_accel.kernels.selection.api import select_pooled

    for length in args.lengths:
        leaves = [x.requires_grad_() for x in inputs(length, args.heads, args.head_dim)]
        q, k, v = (x.detach() for x in leaves)
        grad = torch.randn_like(q)
        weight = torch.randn(args.head_dim, args.head_dim, device="cuda", requires_grad=True)
        bias = torch.randn(args.head_dim, device="cuda", requires_grad=True)
        plain = dense_cudnn(q, k, v)
        dense = report.add(
            lambda: {"ms": median_ms(plain), "device_ms": device_ms(plain)}, section="sla", op="cudnn", S=length
        )
        training = dense_backward_cudnn(*leaves, grad)
        dense_both = report.add(lambda: {"ms": median_ms(training)}, section="sla", op="cudnn fwd+bwd", S=length)
        for block_k in (128, 64):
            for every in (True, False):

                def route(block_k=block_k) -> BlockMask:
                    with torch.no_grad():
                        return select_pooled(q, k, block_q=128, block_k=block_k, density=0.05)

                def infer(every=every) -> torch.Tensor:
                    with torch.no_grad():
                        critical = route()
                        out = block_sparse_attention(q, k, v, critical)
                        return add_linear_branch(out, q, k, v, None if every else critical, weight, bias)

                def train(every=every) -> object:
                    critical = route()
                    out = block_sparse_attention(*leaves, critical)
                    out = plus_linear_branch(out, *leaves, None if every else critical, weight, bias)
                    return torch.autograd.grad(out, (*leaves, weight, bias), grad)

                for name, call, base in (("forward", infer, dense), ("fwd+bwd", train, dense_both)):

                    def measure(name=name, call=call, base=base, route=route, every=every) -> dict[str, object]:
                        ms = median_ms(call)
                        found = {"ms": ms, "over_cudnn": base.get("ms", math.nan) / ms}
                        if name == "forward":  # several launches: what of the time is the host's
                            found["device_ms"] = device_ms(call)
                            found["device_over_cudnn"] = base.get("device_ms", math.nan) / found["device_ms"]
                            found["error"] = sla_error(call(), q, k, v, route(), every, weight, bias)
                        return found

                    report.add(
                        measure,
                        section="sla",
                        op=name,
                        S=length,
                        block=f"128x{block_k}",
                        linear="all tokens" if every else "non-critical",
                    )


HOPPER_CONFIGS = {
    # (kind, keys a block): (stages, turns)
    ("half", 128): ((2, False), (2, True)),
    ("int8", 128): ((3, False), (3, True)),
    ("int8_fp8", 128): ((4, False), (4, True)),
    ("half", 64): ((4, False), (4, True), (5, False), (5, True)),
    ("int8", 64): ((6, False), (6, True)),
    ("int8_fp8", 64): ((8, False), (8, True)),
}


def section_hopper(report: Report, args: argparse.Namespace) -> None:
    """Buffer counts and turn-taking of the Hopper kernel, all precisions, and flash-attn-4 among them.

    Timed in turns, so that the GPU's clock, which falls under load, is the same for all. With ``--shard i/n``
    every n-th configuration is compiled and run once, untimed.
    """
    from dit_accel.kernels.attention.hopper.forward import HopperConfig, hopper_forward
    from dit_accel.kernels.quantized.triton.prologue import quantize_inputs

    shard, shards = (int(x) for x in args.shard.split("/")) if args.shard else (0, 0)
    length = args.lengths[0]
    q, k, v = inputs(length, args.heads, args.head_dim)
    scale = q.shape[-1] ** -0.5
    for block_k in args.hopper_blocks:
        data = {"half": None}
        for kind in ("int8", "int8_fp8"):
            data[kind] = quantize_inputs(q, k, v, 128, block_k, precision=kind)
        for density in (0.05, 0.2):
            mask = random_mask(args.heads, length, 128, block_k, density)
            calls = {}
            for (kind, keys), configs in HOPPER_CONFIGS.items():
                for config in configs if keys == block_k else ():
                    calls[kind, config] = lambda kind=kind, config=config, mask=mask: hopper_forward(
                        q, k, v, mask, None, None, scale, quantized=data[kind], config=HopperConfig(*config)
                    )[0]
            if not shards:
                with contextlib.suppress(ImportError):
                    calls["fa4", None] = sparse_fa4(q, k, v, mask)
            times = {name: [] for name in calls}
            for _ in range(0 if shards else 3):
                for name, call in calls.items():
                    times[name].append(median_ms(call, 15))
            for number, ((kind, config), call) in enumerate(calls.items()):
                if shards and number % shards != shard:
                    continue

                def measure(call=call, name=(kind, config), mask=mask) -> dict[str, object]:
                    error = oracle_error(call(), q, k, v, mask)
                    if shards:
                        return {"error": error}
                    ms = sorted(times[name])[1]
                    return {"ms": ms, "eff": operations(q, mask) / ms / 1e9, "error": error}

                report.add(measure, op=f"hopper {kind}", block_k=block_k, density=density, config=config)


def section_quantized(report: Report, args: argparse.Namespace) -> None:
    """INT8 and FP8 with the prologue and without, and the kernel's variants, over our own half precision."""
    from dit_accel.kernels import quantized_block_sparse_attention
    from dit_accel.kernels.attention.hopper.forward import default_config, hopper_forward
    from dit_accel.kernels.quantized.triton.prologue import quantize_inputs

    for length in args.lengths:
        q, k, v = inputs(length, args.heads, args.head_dim)
        scale = q.shape[-1] ** -0.5

        def ready(precision: str, key_scales: str = "block") -> QuantizedInputs:
            return quantize_inputs(q, k, v, 128, 128, precision=precision, key_scales=key_scales)

        for precision, key_scales in (("int8", "block"), ("int8_fp8", "block"), ("int8", "thread")):
            prologue = lambda: ready(precision, key_scales)  # noqa: E731
            # q, k and where it is rewritten v, in 16 bits and out in 8; k (in part) and v once more for statistics.
            moved = (3 + 0.25) * q.nbytes if precision == "int8" else (4.5 + 1.25) * q.nbytes
            report.add(
                lambda: {
                    "ms": median_ms(prologue),
                    "device_ms": (inner := device_ms(prologue)),
                    "device_GB_s": moved / inner / 1e6,
                },
                section="quantized",
                op=f"prologue {precision} by {key_scales}",
                S=length,
            )
        for density in sorted(DENSITIES, reverse=True):
            mask = random_mask(args.heads, length, 128, 128, density)

            def whole(precision: str) -> Callable:
                return lambda: lambda: quantized_block_sparse_attention(q, k, v, mask, precision=precision)

            def kernel(precision: str, key_scales: str = "block", **changes: object) -> Callable:
                def make() -> Callable:
                    data = ready(precision, key_scales)
                    config = replace(default_config(128, args.head_dim, precision), **changes)
                    return lambda: hopper_forward(q, k, v, mask, None, None, scale, quantized=data, config=config)[0]

                return make

            makers = {"half": lambda: lambda: block_sparse_attention(q, k, v, mask)}
            for precision in ("int8", "int8_fp8"):
                makers[f"{precision} with prologue"] = whole(precision)
                makers[f"{precision} kernel"] = kernel(precision)
                if length == args.lengths[0] and density != 0.1:
                    usual = default_config(128, args.head_dim, precision)
                    turns = not usual.take_turns
                    makers[f"{precision} kernel, by thread"] = kernel(precision, "thread")
                    makers[f"{precision} kernel, turns {turns}"] = kernel(precision, take_turns=turns)
            report.turns(
                makers,
                checked(q, k, v, mask),
                "half",
                operations(q, mask),
                ["half", "int8 with prologue", "int8_fp8 with prologue"],
                section="quantized",
                S=length,
                density=density,
            )


def section_backward(report: Report, args: argparse.Namespace) -> None:
    """Forward with backward, in order and permuted, over cuDNN dense."""
    for length in args.lengths[:1]:
        q, k, v = (x.requires_grad_() for x in inputs(length, args.heads, args.head_dim))
        grad = torch.randn_like(q)

        dense = dense_backward_cudnn(q, k, v, grad)
        base = report.add(lambda: {"ms": median_ms(dense)}, section="backward", op="cudnn fwd+bwd", S=length)
        for block_q, block_k in BLOCKS:
            mask = random_mask(args.heads, length, block_q, block_k, 0.1)
            permutation = torch.rand(1, args.heads, length, device="cuda").argsort(-1).to(torch.int32)
            for rows in (None, permutation):

                def ours() -> tuple[torch.Tensor, ...]:
                    out = block_sparse_attention(q, k, v, mask, rows=rows)
                    return torch.autograd.grad(out, (q, k, v), grad)

                def measure() -> dict[str, object]:
                    ms = median_ms(ours)
                    return {
                        "ms": ms,
                        "eff": 3.5 * operations(q, mask) / ms / 1e9,
                        "over_cudnn": base.get("ms", math.nan) / ms,
                        "error": query_gradient_error(ours()[0], grad, q, k, v, mask, rows),
                    }

                report.add(
                    measure,
                    section="backward",
                    op="fwd+bwd" if rows is None else "fwd+bwd permuted",
                    S=length,
                    block=f"{block_q}x{block_k}",
                    density=0.1,
                )


# Share of the time that a section of ``--sections all`` may take; what one leaves over the next ones may use.
ALL = {"forward": 0.25, "quantized": 0.3, "rows": 0.2, "backward": 0.15, "sla": 0.1}
SECTIONS = {
    "forward": section_forward,
    "quantized": section_quantized,
    "rows": section_rows,
    "backward": section_backward,
    "sla": section_sla,
    "hopper": section_hopper,
    "pairs": section_pairs,
    "pairs8": section_pairs_in_8_bits,
    "steps": section_steps,
    "carried": section_carried,
}


def run(report: Report, args: argparse.Namespace) -> None:
    """Sections in turn, each until its share of ``--seconds`` has passed."""
    names = list(ALL) if args.sections == "all" else args.sections.split(",")
    begin, share, total = time.monotonic(), 0.0, sum(ALL.get(name, 0.1) for name in names)
    for name in names:
        share += ALL.get(name, 0.1) / total
        report.until = begin + args.seconds * share
        SECTIONS[name](report, args)
        torch.cuda.empty_cache()


def print_table(rows: list[dict[str, object]]) -> None:
    """The rows once more, short, so that the end of the output says all."""
    labels = ("section", "S", "block", "density", "shared", "tokens", "op", "linear")
    columns = (*PREFIXES, *(f"{prefix}eff" for prefix in PREFIXES.values()), "error", "extra_memory_share")
    print(f"\n{'':64}" + "".join(f"{name[:10]:>11}" for name in (*columns, "over base", "load over", "alone over")))
    for row in rows:
        label = " ".join(str(row[key]) for key in labels if key in row)
        ratio = next((row[key] for key in row if key.startswith(("device_over", "over"))), None)
        loaded = (next((row[key] for key in row if key.startswith(over)), None) for over in ("load_over", "alone_over"))
        cells = [*(row.get(key) for key in columns), ratio, *loaded]
        text = "".join(f"{cell:11.4g}" if isinstance(cell, float) else f"{str(cell or '')[:10]:>11}" for cell in cells)
        print(f"{label[:64]:64}{text}" + ("  (out of time)" if "skipped" in row else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default="all", help=f"all, or of {','.join(SECTIONS)}")
    parser.add_argument("--seconds", type=float, default=math.inf, help="time for all sections, about")
    parser.add_argument("--lengths", default="32768,32760,75600")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--hopper-blocks", default="128,64")
    parser.add_argument("--shard", default="")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--against", metavar="COMMIT", help="time this tree and a commit in turns, see against.py")
    args = parser.parse_args()
    if args.against:
        script = Path(__file__).with_name("against.py")
        raise SystemExit(subprocess.run([sys.executable, str(script), args.against]).returncode)
    args.lengths = [int(x) for x in args.lengths.split(",")]
    args.hopper_blocks = [int(x) for x in args.hopper_blocks.split(",")]
    torch.manual_seed(0)
    report = Report()
    try:
        run(report, args)
    finally:  # a run that is interrupted keeps what it measured
        if args.json:
            head = {
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "triton": triton.__version__,
                "cudnn": torch.backends.cudnn.version(),
                "command": " ".join(["python", *sys.argv]),
                "units": "ms, device_ms, load_ms: median milliseconds, called, replayed, replayed in random order "
                "under load; alone_ms: one call over and over under load; eff: TFLOP/s of the kept blocks; error: "
                "relative Frobenius",
            }
            args.json.write_text(json.dumps({**head, "rows": report.rows}, indent=1) + "\n")
        print_table(report.rows)


if __name__ == "__main__":
    main()
