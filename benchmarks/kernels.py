"""Time the attention kernels on one GPU, checked against an fp64 oracle in the same run.

    python benchmarks/kernels.py --json out.json [--sections forward,sla,backward,rows,quantized] [--lengths 32768]

Random normal bf16 inputs, batch 1, 12 heads, head dim 128, random BlockMask. "eff" counts the kept blocks'
operations only (4 H S^2 D density, and 3.5 times that with the backward). Anchors of the same run: cuDNN and,
where it is installed, flash-attn-4, dense and with the same masks.
"""

# ruff: noqa: B023 - every closure is called before its loop moves on
from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from kernel_cases import (
    BLOCKS,
    DENSITIES,
    Report,
    dense_backward_cudnn,
    dense_cudnn,
    dense_fa4,
    device_ms,
    inputs,
    median_ms,
    operations,
    oracle_error,
    random_mask,
    sparse_fa4,
)

from dit_accel.kernels import BlockMask, block_sparse_attention


def section_forward(report: Report, args: argparse.Namespace) -> None:
    """Ours (the backend that is chosen by itself) and flash-attn-4, dense and sparse, over cuDNN dense."""
    for length in args.lengths:
        q, k, v = inputs(length, args.heads, args.head_dim)
        full = 4 * args.heads * length * length * args.head_dim

        def dense(make=dense_cudnn) -> dict[str, object]:
            ms = median_ms(make(q, k, v))
            return {"ms": ms, "eff": full / ms / 1e9}

        base = report.add(dense, op="cudnn", S=length)
        report.add(lambda: dense(dense_fa4), op="fa4 dense", S=length)
        for block_q, block_k in BLOCKS[: 2 if length == args.lengths[0] else 1]:
            for density in DENSITIES:
                mask = random_mask(args.heads, length, block_q, block_k, density)
                for name in ("ours", "fa4"):

                    def measure(name=name, mask=mask) -> dict[str, object]:
                        if name == "fa4":
                            call = sparse_fa4(q, k, v, mask)
                        else:
                            call = lambda: block_sparse_attention(q, k, v, mask)  # noqa: E731
                        error = oracle_error(call(), q, k, v, mask)
                        torch.cuda.reset_peak_memory_stats()
                        before = torch.cuda.memory_allocated()
                        call()
                        extra = torch.cuda.max_memory_allocated() - before - q.nbytes
                        ms = median_ms(call)
                        return {
                            "ms": ms,
                            "eff": operations(q, mask) / ms / 1e9,
                            "over_cudnn": base.get("ms", math.nan) / ms,
                            "device_ms": (inner := device_ms(call)),
                            "device_eff": operations(q, mask) / inner / 1e9,
                            "error": error,
                            "extra_memory_share": extra / (4 * q.nbytes),
                        }

                    report.add(measure, op=name, S=length, block=f"{block_q}x{block_k}", density=density)


def section_sla(report: Report, args: argparse.Namespace) -> None:
    """SLA with its routing at 5%: forward, and forward with backward, over cuDNN dense in the same run."""
    from dit_accel.kernels.linear_branch import add_linear_branch, linear_branch
    from dit_accel.kernels.selection import select_pooled

    for length in args.lengths:
        leaves = [x.requires_grad_() for x in inputs(length, args.heads, args.head_dim)]
        q, k, v = (x.detach() for x in leaves)
        grad = torch.randn_like(q)
        weight = torch.randn(args.head_dim, args.head_dim, device="cuda", requires_grad=True)
        bias = torch.randn(args.head_dim, device="cuda", requires_grad=True)
        dense = report.add(lambda: {"ms": median_ms(dense_cudnn(q, k, v))}, op="cudnn", S=length)
        training = dense_backward_cudnn(*leaves, grad)
        dense_both = report.add(lambda: {"ms": median_ms(training)}, op="cudnn fwd+bwd", S=length)
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
                    branch = linear_branch(*leaves, None if every else critical)
                    out = out + F.linear(branch, weight.to(q.dtype), bias.to(q.dtype))
                    return torch.autograd.grad(out, (*leaves, weight, bias), grad)

                for name, call, base in (("forward", infer, dense), ("fwd+bwd", train, dense_both)):

                    def measure(call=call, base=base) -> dict[str, object]:
                        ms = median_ms(call)
                        return {"ms": ms, "over_cudnn": base.get("ms", math.nan) / ms}

                    report.add(
                        measure,
                        op=f"sla {name}",
                        S=length,
                        block=f"128x{block_k}",
                        linear="all tokens" if every else "non-critical",
                    )


def section_rows(report: Report, args: argparse.Namespace) -> None:
    """A permutation of the rows by the kernel, against the same kernel in order and a reorder by torch."""
    for length in args.lengths[:1]:
        q, k, v = inputs(length, args.heads, args.head_dim)
        rows = torch.rand(1, args.heads, length, device="cuda").argsort(-1).to(torch.int32)
        for block_q, block_k in BLOCKS[:2]:
            for density in (0.05, 0.2):
                mask = random_mask(args.heads, length, block_q, block_k, density)

                def measure(mask=mask) -> dict[str, object]:
                    call = lambda: block_sparse_attention(q, k, v, mask, rows=rows)  # noqa: E731
                    error = oracle_error(call(), q, k, v, mask, rows)
                    plain = median_ms(lambda: block_sparse_attention(q, k, v, mask))
                    ms = median_ms(call)
                    inner = device_ms(call)
                    plain_inner = device_ms(lambda: block_sparse_attention(q, k, v, mask))
                    return {
                        "ms": ms,
                        "in_order_ms": plain,
                        "cost": ms / plain - 1,
                        "device_cost": inner / plain_inner - 1,
                        "error": error,
                    }

                report.add(measure, op="rows", S=length, block=f"{block_q}x{block_k}", density=density)
        from dit_accel.kernels.reorder import reorder_pair

        report.add(lambda: {"ms": median_ms(lambda: reorder_pair(k, v, rows))}, op="reorder k, v", S=length)
        index = rows.long().transpose(1, 2)[..., None].expand_as(q)
        report.add(
            lambda: {"ms": median_ms(lambda: [x.gather(1, index) for x in (q, k, v)])},
            op="torch reorder",
            S=length,
        )


HOPPER_CONFIGS = {
    # (kind, keys a block): (stages, query buffers, turns)
    ("half", 128): ((3, 1, False), (3, 1, True), (2, 2, False), (2, 2, True)),
    ("int8", 128): ((3, 1, False), (3, 1, True), (3, 2, False), (3, 2, True)),
    ("int8_fp8", 128): ((4, 1, False), (4, 1, True), (4, 2, False), (4, 2, True)),
    ("half", 64): ((6, 1, False), (6, 1, True), (5, 2, False), (5, 2, True)),
    ("int8", 64): ((6, 1, False), (6, 1, True)),
    ("int8_fp8", 64): ((8, 1, False), (8, 1, True)),
}


def section_hopper(report: Report, args: argparse.Namespace) -> None:
    """Buffer counts and turn-taking of the Hopper kernel, all precisions, and flash-attn-4 among them.

    Timed in turns, so that the GPU's clock, which falls under load, is the same for all. With ``--shard i/n``
    every n-th configuration is compiled and run once, untimed.
    """
    from dit_accel.kernels.hopper_forward import HopperConfig, hopper_forward
    from dit_accel.kernels.triton_quantize import quantize_inputs

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
    """Quantised attention with its prologue, against our own half precision in the same run."""
    from dit_accel.kernels import quantized_block_sparse_attention
    from dit_accel.kernels.triton_quantize import quantize_inputs

    for length in args.lengths:
        q, k, v = inputs(length, args.heads, args.head_dim)
        for precision in ("int8", "int8_fp8"):
            prologue = lambda: quantize_inputs(q, k, v, 128, 128, precision=precision)  # noqa: E731
            report.add(
                lambda: {"ms": median_ms(prologue), "device_ms": device_ms(prologue)},
                op=f"prologue {precision}",
                S=length,
            )
        for density in DENSITIES:
            mask = random_mask(args.heads, length, 128, 128, density)
            half = lambda: block_sparse_attention(q, k, v, mask)  # noqa: E731
            base = report.add(
                lambda: {"ms": median_ms(half), "device_ms": device_ms(half)}, op="half", S=length, density=density
            )
            for precision in ("int8", "int8_fp8"):
                ready = quantize_inputs(q, k, v, 128, 128, precision=precision)
                for name, data in (("with prologue", None), ("kernel only", ready)):
                    call = lambda: quantized_block_sparse_attention(  # noqa: E731
                        q, k, v, mask, precision=precision, quantized=data
                    )

                    def measure() -> dict[str, object]:
                        error = oracle_error(call(), q, k, v, mask)
                        ms = median_ms(call)
                        return {
                            "ms": ms,
                            "eff": operations(q, mask) / ms / 1e9,
                            "over_half": base.get("ms", math.nan) / ms,
                            "device_ms": (inner := device_ms(call)),
                            "device_over_half": base.get("device_ms", math.nan) / inner,
                            "error": error,
                        }

                    report.add(measure, op=f"{precision} {name}", S=length, density=density)


def section_backward(report: Report, args: argparse.Namespace) -> None:
    for length in args.lengths[:1]:
        q, k, v = (x.requires_grad_() for x in inputs(length, args.heads, args.head_dim))
        grad = torch.randn_like(q)

        dense = dense_backward_cudnn(q, k, v, grad)
        base = report.add(lambda: {"ms": median_ms(dense)}, op="cudnn fwd+bwd", S=length)
        for block_q, block_k in BLOCKS:
            for permuted in (False, True):
                mask = random_mask(args.heads, length, block_q, block_k, 0.1)
                rows = torch.rand(1, args.heads, length, device="cuda").argsort(-1).to(torch.int32)
                rows = rows if permuted else None

                def ours(mask=mask, rows=rows) -> None:
                    out = block_sparse_attention(q, k, v, mask, rows=rows)
                    torch.autograd.grad(out, (q, k, v), grad)

                def measure(ours=ours, mask=mask) -> dict[str, object]:
                    ms = median_ms(ours)
                    return {
                        "ms": ms,
                        "eff": 3.5 * operations(q, mask) / ms / 1e9,
                        "over_cudnn": base.get("ms", math.nan) / ms,
                    }

                report.add(measure, op="fwd+bwd", S=length, block=f"{block_q}x{block_k}", density=0.1, rows=permuted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sections", default="forward,sla,quantized,backward,rows")
    parser.add_argument("--lengths", default="32768,32760,75600")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--hopper-blocks", default="128,64")
    parser.add_argument("--shard", default="")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.lengths = [int(x) for x in args.lengths.split(",")]
    args.hopper_blocks = [int(x) for x in args.hopper_blocks.split(",")]
    torch.manual_seed(0)
    report = Report()
    try:
        for section in args.sections.split(","):
            globals()[f"section_{section}"](report, args)
    finally:  # a run that is interrupted keeps what it measured
        if args.json:
            head = {
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "triton": triton.__version__,
                "cudnn": torch.backends.cudnn.version(),
                "command": " ".join(["python", *sys.argv]),
                "units": "ms: median milliseconds; eff: TFLOP/s of the kept blocks; error: relative Frobenius",
            }
            args.json.write_text(json.dumps({**head, "rows": report.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
