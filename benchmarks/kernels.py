"""Time the attention kernels on one GPU, checked against an fp64 oracle in the same run.

    python benchmarks/kernels.py --json out.json [--sections forward,backward,rows,sweep] [--lengths 32768]

Random normal bf16 inputs, batch 1, 12 heads, head dim 128, random BlockMask. "eff" counts the kept blocks'
operations only (4 H S^2 D density, and 3.5 times that with the backward).
"""

# ruff: noqa: B023 - every closure is called before its loop moves on
from __future__ import annotations

import argparse
import json
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_accel.kernels import BlockMask, block_sparse_attention
from dit_accel.kernels.triton_backward import backward
from dit_accel.kernels.triton_forward import forward
from dit_accel.kernels.tuning import LaunchConfig, entry_key

BLOCKS = ((128, 128), (128, 64), (64, 64))
DENSITIES = (0.05, 0.1, 0.2)


def median_ms(function: Callable[[], object], rep: int = 120) -> float:
    return triton.testing.do_bench(function, warmup=30, rep=rep, return_mode="median")


def random_mask(heads: int, length: int, block_q: int, block_k: int, density: float) -> BlockMask:
    nq, nk = -(-length // block_q), -(-length // block_k)
    picked = torch.rand(1, heads, nq, nk, device="cuda").argsort(-1)[..., : max(1, int(nk * density))]
    keep = torch.zeros(1, heads, nq, nk, dtype=torch.bool, device="cuda").scatter_(-1, picked, True)
    return BlockMask.from_dense(keep, block_q, block_k, length, length)


def operations(q: torch.Tensor, mask: BlockMask) -> float:
    batch, length, heads, dim = q.shape
    return 4 * batch * heads * length * length * dim * float(mask.density())


def oracle_error(out: torch.Tensor, q, k, v, mask: BlockMask, rows=None, samples: int = 4) -> float:
    """Relative error of a few query blocks of ``out`` against float64 attention over their kept keys."""
    nq, _ = mask.num_blocks
    worst = 0.0
    for n in range(samples):
        head, block = (5 * n) % q.shape[2], (nq - 1) * n // max(1, samples - 1)
        slots = torch.arange(block * mask.block_q, min((block + 1) * mask.block_q, q.shape[1]), device=q.device)
        kept = mask.kv_indices[0, min(head, mask.kv_indices.shape[1] - 1), block]
        kept = kept[: int(mask.kv_num_blocks[0, min(head, mask.kv_indices.shape[1] - 1), block])].long()
        keys = (kept[:, None] * mask.block_k + torch.arange(mask.block_k, device=q.device)).flatten()
        keys = keys[keys < k.shape[1]]
        if rows is not None:
            slots, keys = rows[0, head, slots].long(), rows[0, head, keys].long()
        scores = q[0, slots, head].double() @ k[0, keys, head].double().T / math.sqrt(q.shape[-1])
        exact = scores.softmax(-1) @ v[0, keys, head].double()
        error = (out[0, slots, head].double() - exact).norm() / exact.norm()
        worst = max(worst, error.item()) if error.isfinite() else math.nan
    return worst


class Report:
    """Rows of one run; a failing item is recorded and the run goes on."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []

    def add(self, function: Callable[[], dict[str, object]], **labels: object) -> dict[str, object]:
        try:
            row = {**labels, **function()}
        except Exception as error:
            traceback.print_exc(limit=3)
            row = {**labels, "error": f"{type(error).__name__}: {str(error)[:160]}"}
        self.rows.append(row)
        text = (f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items())
        print("  ".join(text), flush=True)
        return row


def inputs(length: int, heads: int, dim: int) -> list[torch.Tensor]:
    return [torch.randn(1, length, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)]


def dense_cudnn(q, k, v) -> Callable[[], torch.Tensor]:
    head_major = [x.transpose(1, 2) for x in (q, k, v)]

    def call() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(*head_major)

    return call


def implementations(q, k, v, mask: BlockMask, rows) -> dict[str, Callable[[], torch.Tensor]]:
    """Every forward that can run the case, by name."""
    scale = q.shape[-1] ** -0.5
    found: dict[str, Callable[[], torch.Tensor]] = {"triton": lambda: forward(q, k, v, mask, rows, None, scale)[0]}
    try:
        from dit_accel.kernels.hopper_forward import hopper_forward, why_not_hopper

        if why_not_hopper(q, k, v, mask, rows) is None:
            found["hopper"] = lambda: hopper_forward(q, k, v, mask, rows, None, scale)[0]
    except ImportError as error:
        print("no Gluon:", error)
    return found


def section_forward(report: Report, args: argparse.Namespace) -> None:
    for length in args.lengths:
        q, k, v = inputs(length, args.heads, args.head_dim)
        dense = dense_cudnn(q, k, v)
        full = 4 * args.heads * length * length * args.head_dim
        base = report.add(lambda: {"ms": (ms := median_ms(dense)), "eff": full / ms / 1e9}, op="cudnn", S=length)
        for block_q, block_k in BLOCKS:
            for density in DENSITIES:
                mask = random_mask(args.heads, length, block_q, block_k, density)
                for name, call in implementations(q, k, v, mask, None).items():

                    def measure(call=call, mask=mask) -> dict[str, object]:
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
                            "error": error,
                            "extra_memory_share": extra / (4 * q.nbytes),
                        }

                    report.add(measure, op=name, S=length, block=f"{block_q}x{block_k}", density=density)


def section_rows(report: Report, args: argparse.Namespace) -> None:
    for length in args.lengths[:1]:
        q, k, v = inputs(length, args.heads, args.head_dim)
        rows = torch.rand(1, args.heads, length, device="cuda").argsort(-1).to(torch.int32)
        for block_q, block_k in BLOCKS[:2]:
            for density in (0.05, 0.2):
                mask = random_mask(args.heads, length, block_q, block_k, density)
                for name, call in implementations(q, k, v, mask, rows).items():

                    def measure(call=call, mask=mask) -> dict[str, object]:
                        error = oracle_error(call(), q, k, v, mask, rows)
                        return {"ms": median_ms(call), "error": error}

                    report.add(measure, op=f"{name} rows", S=length, block=f"{block_q}x{block_k}", density=density)
        try:
            from dit_accel.kernels.reorder import reorder_pair

            report.add(lambda: {"ms": median_ms(lambda: reorder_pair(k, v, rows))}, op="reorder k, v", S=length)
        except ImportError:
            pass
        index = rows.long().transpose(1, 2)[..., None].expand_as(q)
        report.add(
            lambda: {"ms": median_ms(lambda: [x.gather(1, index) for x in (q, k, v)])},
            op="torch reorder",
            S=length,
        )


HOPPER_CONFIGS = {
    # kind: (stages at 128 keys a block, query buffers, turns)
    "half": ((3, 1, False), (3, 1, True), (2, 2, False), (2, 2, True)),
    "int8": ((3, 1, False), (3, 1, True), (3, 2, False), (3, 2, True)),
    "int8_fp8": ((4, 1, False), (4, 1, True), (4, 2, True)),
}


def section_hopper(report: Report, args: argparse.Namespace) -> None:
    """Buffer counts and turn-taking of the Hopper kernel, all precisions; takes ``--shard``."""
    from dit_accel.kernels.hopper_forward import HopperConfig, hopper_forward
    from dit_accel.kernels.triton_quantize import quantize_inputs

    shard, shards = (int(x) for x in args.shard.split("/")) if args.shard else (0, 0)
    number = 0
    length = args.lengths[0]
    q, k, v = inputs(length, args.heads, args.head_dim)
    scale = q.shape[-1] ** -0.5
    for block_k in args.hopper_blocks:
        masks = {density: random_mask(args.heads, length, 128, block_k, density) for density in (0.05, 0.2)}
        for kind, configs in HOPPER_CONFIGS.items():
            data = None if kind == "half" else quantize_inputs(q, k, v, 128, block_k, precision=kind)
            for stages, q_stages, turns in configs[:2] if block_k == 64 else configs:
                number += 1
                if shards and number % shards != shard:
                    continue
                config = HopperConfig(stages * 128 // block_k, q_stages, turns)
                for density, mask in masks.items():
                    call = lambda: hopper_forward(  # noqa: E731
                        q, k, v, mask, None, None, scale, quantized=data, config=config
                    )[0]

                    def measure() -> dict[str, object]:
                        error = oracle_error(call(), q, k, v, mask)
                        if shards:
                            return {"error": error}
                        ms = median_ms(call, 60)
                        return {"ms": ms, "eff": operations(q, mask) / ms / 1e9, "error": error}

                    report.add(
                        measure,
                        op=f"hopper {kind}",
                        block_k=block_k,
                        density=density,
                        config=str(config)[12:],
                    )


def section_quantized(report: Report, args: argparse.Namespace) -> None:
    """Quantised attention with its prologue, against our own half precision in the same run."""
    from dit_accel.kernels import quantized_block_sparse_attention
    from dit_accel.kernels.triton_quantize import quantize_inputs

    for length in args.lengths:
        q, k, v = inputs(length, args.heads, args.head_dim)
        for precision in ("int8", "int8_fp8"):
            report.add(
                lambda: {"ms": median_ms(lambda: quantize_inputs(q, k, v, 128, 128, precision=precision))},
                op=f"prologue {precision}",
                S=length,
            )
        for density in DENSITIES:
            mask = random_mask(args.heads, length, 128, 128, density)
            half = lambda: block_sparse_attention(q, k, v, mask)  # noqa: E731
            base = report.add(lambda: {"ms": median_ms(half)}, op="half", S=length, density=density)
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
                            "error": error,
                        }

                    report.add(measure, op=f"{precision} {name}", S=length, density=density)


def section_backward(report: Report, args: argparse.Namespace) -> None:
    for length in args.lengths[:1]:
        q, k, v = (x.requires_grad_() for x in inputs(length, args.heads, args.head_dim))
        grad = torch.randn_like(q)

        def dense() -> None:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
            torch.autograd.grad(out, (q, k, v), grad.transpose(1, 2))

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


def section_sweep(report: Report, args: argparse.Namespace) -> None:
    """Try launch configurations at density 0.1 and print the best as entries of the tuning table.

    With ``--shard i/n`` only every n-th configuration is compiled and run once, untimed: start n such
    processes first, and the timing run finds every kernel in Triton's cache.
    """
    length, best, number = args.lengths[0], {}, 0
    shard, shards = (int(x) for x in args.shard.split("/")) if args.shard else (0, 0)
    for dim in args.sweep_dims:
        q, k, v = inputs(length, args.heads, dim)
        grad = torch.randn_like(q)
        rows = torch.rand(1, args.heads, length, device="cuda").argsort(-1).to(torch.int32)
        for block_q, block_k in BLOCKS:
            mask = random_mask(args.heads, length, block_q, block_k, 0.1)
            for permuted in (False, True):
                order = rows if permuted else None
                state = (q, k, v, mask, order, None, dim**-0.5)
                lse = torch.full((1, args.heads, length), 12.0, device="cuda")
                for op in ("forward", "backward_dq", "backward_dkv"):
                    if permuted and op != "forward":
                        continue  # the backward takes the in-order entry
                    key = entry_key(op, block_q, block_k, dim, permuted)
                    for warps in (4, 8):
                        for stages in (2, 3, 4) if op == "forward" else (1, 2, 3):
                            call = _sweep_call(op, state, LaunchConfig(warps, stages), q, lse, grad)
                            number += 1
                            if shards:
                                if number % shards == shard:
                                    report.add(lambda: {"ok": call() is not None}, sweep=key)
                                continue
                            row = report.add(lambda: {"ms": median_ms(call, 40)}, sweep=key, warps=warps, stages=stages)
                            if row.get("ms", math.inf) < best.get(key, (math.inf,))[0]:
                                best[key] = (row["ms"], warps, stages)
    entries = {key: list(value[1:]) for key, value in sorted(best.items())}
    print(json.dumps({"device": torch.cuda.get_device_name(), "entries": entries}, indent=1))
    report.rows.append({"entries": entries})


def _sweep_call(op: str, state, config: LaunchConfig, out, lse, grad) -> Callable[[], object]:
    if op == "forward":
        return lambda: forward(*state, config)
    small = LaunchConfig(8, 1)
    dq, dkv = (config, small) if op == "backward_dq" else (small, config)
    return lambda: backward(*state, out, lse, grad, None, config_dq=dq, config_dkv=dkv)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sections", default="forward,rows,backward")
    parser.add_argument("--lengths", default="32768,32760,75600")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--sweep-dims", default="128,64")
    parser.add_argument("--hopper-blocks", default="128,64")
    parser.add_argument("--shard", default="")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.lengths = [int(x) for x in args.lengths.split(",")]
    args.hopper_blocks = [int(x) for x in args.hopper_blocks.split(",")]
    args.sweep_dims = [int(x) for x in args.sweep_dims.split(",")]
    torch.manual_seed(0)
    report = Report()
    for section in args.sections.split(","):
        globals()[f"section_{section}"](report, args)
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
