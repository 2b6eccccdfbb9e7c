"""Blocks of 64 queries, two in a program of the Hopper kernel, beside the portable kernel: sections of kernels.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from kernel_cases import DENSITIES, Report, checked, inputs, operations

from dit_accel.kernels import BlockMask

# Of a block's score what its pair has in common, against what each query block has of its own.
ALIKE = 2.0


def section_pairs(report: Report, args: argparse.Namespace) -> None:
    """Lists by chance, and lists of neighbours that are largely alike; both forms with turns and without.

    Beside them blocks of 128 queries at the same density. At density 0.2 permuted rows too.
    """
    for length in args.lengths:
        q, k, v = inputs(length, args.heads, args.head_dim)
        rows = torch.rand(1, args.heads, length, device=q.device).argsort(-1).to(torch.int32)
        for density in sorted(DENSITIES, reverse=True):
            for alike in (0.0, ALIKE):
                mask = pair_mask(args.heads, length, 64, density, alike, q.device)
                labels = {"section": "pairs", "S": length, "block": "64x64", "density": density}
                labels["shared"] = round(shared_share(mask), 3)
                compare(report, q, k, v, mask, None, labels)
                if density == 0.2 and not alike:
                    compare(report, q, k, v, mask, rows, {**labels, "tokens": "permuted"})


def section_pairs_in_8_bits(report: Report, args: argparse.Namespace) -> None:
    """INT8 queries and keys, and FP8 values, with lists by chance; at density 0.2 permuted rows too."""
    for length in args.lengths:
        q, k, v = inputs(length, args.heads, args.head_dim)
        rows = torch.rand(1, args.heads, length, device=q.device).argsort(-1).to(torch.int32)
        for density in (0.2, 0.05):
            mask = pair_mask(args.heads, length, 64, density, 0.0, q.device)
            for precision in ("int8", "int8_fp8"):
                labels = {"section": "pairs8", "S": length, "block": "64x64", "density": density}
                compare_in_8_bits(report, q, k, v, mask, None, precision, labels)
                if density == 0.2:
                    compare_in_8_bits(report, q, k, v, mask, rows, precision, {**labels, "tokens": "permuted"})


def pair_mask(
    heads: int, length: int, block_q: int, density: float, alike: float, device: torch.device, block_k: int = 64
) -> BlockMask:
    """The blocks of ``block_k`` keys with the largest of random scores, as many in every row."""
    nq, nk = -(-length // block_q), -(-length // block_k)
    score = torch.rand(1, heads, nq, nk, device=device)
    score += alike * torch.rand(1, heads, -(-nq // 2), nk, device=device).repeat_interleave(2, 2)[:, :, :nq]
    picked = score.topk(max(1, int(nk * density))).indices
    keep = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, picked, True)
    return BlockMask.from_dense(keep, block_q, block_k, length, length)


def shared_share(mask: BlockMask) -> float:
    """Of all entries of the lists, those that a pair loads once for both."""
    from dit_accel.kernels.mask.query_pairs import query_pairs

    header = query_pairs(mask, 64).header
    return float(2 * header[..., 4].sum() / header[..., :2].sum())


def compare(report: Report, q, k, v, mask: BlockMask, rows: torch.Tensor | None, labels: dict[str, object]) -> None:
    """All of them in turns; lists are paired in every call, as a plan's are that is unpacked for it."""
    wide, check = beside_wide(q, k, v, mask, rows, labels)
    makers = {
        "portable": lambda: portable(q, k, v, mask, rows),
        "pairs, free": lambda: hopper(q, k, v, mask, rows, take_turns=False),
        "pairs, turns": lambda: hopper(q, k, v, mask, rows, take_turns=True),
        "hopper 128x64": lambda: hopper(q, k, v, wide, rows),
    }
    report.turns(makers, check, "portable", operations(q, mask), **labels)


def compare_in_8_bits(
    report: Report, q, k, v, mask: BlockMask, rows, precision: str, labels: dict[str, object]
) -> None:
    """All of them in turns, from inputs that are quantised already; in half precision pairs once more."""
    wide, check = beside_wide(q, k, v, mask, rows, labels)
    makers = {
        f"portable {precision}": lambda: portable(q, k, v, mask, rows, precision),
        f"pairs {precision}, free": lambda: hopper(q, k, v, mask, rows, precision, take_turns=False),
        f"pairs {precision}, turns": lambda: hopper(q, k, v, mask, rows, precision, take_turns=True),
        f"hopper 128x64 {precision}": lambda: hopper(q, k, v, wide, rows, precision),
        "pairs half": lambda: hopper(q, k, v, mask, rows, take_turns=False),
    }
    report.turns(makers, check, f"portable {precision}", operations(q, mask), **labels)


def beside_wide(q, k, v, mask: BlockMask, rows, labels: dict[str, object]) -> tuple[BlockMask, Callable]:
    """Blocks of 128 queries at the same density, and what checks a call with the mask that it has."""
    wide = pair_mask(q.shape[2], q.shape[1], 128, float(labels["density"]), 0.0, q.device)

    def check(name: str, call: Callable[[], torch.Tensor]) -> dict[str, object]:
        return checked(q, k, v, wide if "128x64" in name else mask, rows)(name, call)

    return wide, check


def portable(q, k, v, mask: BlockMask, rows, precision: str | None = None) -> Callable[[], torch.Tensor]:
    from dit_accel.kernels.attention.triton.forward import forward
    from dit_accel.kernels.quantized.triton.forward import quantized_forward

    scale = q.shape[-1] ** -0.5
    if precision is None:
        return lambda: forward(q, k, v, mask, rows, None, scale)[0]
    ready = quantized(q, k, v, mask, rows, precision)
    return lambda: quantized_forward(ready, mask, rows, None, scale, q.shape[2], q.dtype)[0]


def hopper(
    q, k, v, mask: BlockMask, rows, precision: str | None = None, **changes: object
) -> Callable[[], torch.Tensor]:
    from dit_accel.kernels.attention.hopper.forward import default_config, hopper_forward

    scale = q.shape[-1] ** -0.5
    pairs = mask.block_q == 64
    config = replace(default_config(64, q.shape[-1], precision, rows is not None, pairs=pairs), **changes)
    ready = None if precision is None else quantized(q, k, v, mask, rows, precision)
    return lambda: hopper_forward(q, k, v, mask, rows, None, scale, quantized=ready, config=config)[0]


def quantized(q, k, v, mask: BlockMask, rows, precision: str):
    from dit_accel.kernels.quantized.triton.prologue import quantize_inputs

    return quantize_inputs(q, k, v, mask.block_q, mask.block_k, precision=precision, rows=rows)
