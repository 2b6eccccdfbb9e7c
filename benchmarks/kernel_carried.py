"""A sparse call with and without what ``compensate=carried`` adds to it, blocks of 64 x 64: a section of kernels.py.

The addition follows the kernel: the output is read and written once more, and the kept difference read: 6 bytes a
value in bfloat16, 5 where 8 bits are kept, and a kernel that added it itself would need 2. "kept" is what a dense step
costs beside its plan: a sparse call and the difference from it. "means" is ``compensate=residual``: means are pooled,
the plan's lists packed, and one kernel goes on over the means; "over means" is both, ``compensate.means=True``.

    python benchmarks/kernels.py --sections carried --lengths 118800 --heads 24     # HunyuanVideo, 129 frames of 720p
    python benchmarks/kernels.py --sections carried --lengths 32760 --heads 12      # Wan 1.3B, 81 frames of 480p
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from kernel_cases import Report, checked, inputs, operations
from kernel_pairs import pair_mask

from dit_accel.call import AttentionCall, AttentionInputs
from dit_accel.kernels import BlockMask, block_sparse_attention
from dit_accel.kernels.common.choice import BY_NAME, Choice
from dit_accel.layout import StepContext, TokenLayout
from dit_accel.plan import AttentionPlan, LeftOut
from dit_accel.run import Run
from dit_accel.stages.compensate.carried import Carried
from dit_accel.stages.compensate.residual import PooledResidual
from dit_accel.stages.order.simple import Tiles, tile_order

GRIDS = {118_800: (33, 45, 80), 32_760: (21, 30, 52)}
"""Of latents; other lengths are one row of tokens."""
DENSITIES = (0.1, 0.2)
MADE, NOW = (StepContext(index=index, num_steps=30) for index in (6, 9))


def section_carried(report: Report, args: argparse.Namespace) -> None:
    """The sparse call of a plan in tile order, alone, with means, and with a difference of 16 and 8 bits a value."""
    for length in args.lengths:
        grid = GRIDS.get(length, (1, 1, length))
        q, k, v = inputs(length, args.heads, args.head_dim)
        rows = tile_order(grid, Tiles().shape, q.device).to(torch.int32)[None, None]
        for density in DENSITIES:
            mask = pair_mask(args.heads, length, 64, density, 0.0, q.device)
            labels = {"section": "carried", "S": length, "block": "64x64", "density": density}
            compare(report, (q, k, v), grid, mask, rows, labels)


def compare(
    report: Report, qkv: tuple[torch.Tensor, ...], grid: tuple[int, int, int], mask: BlockMask, rows, labels
) -> None:
    """All of them in turns."""
    call = AttentionCall.of(0, AttentionInputs(*qkv), TokenLayout(grid, 0, qkv[0].shape[1]), NOW, Run())
    plan = AttentionPlan(rows, mask)
    dense = torch.randn_like(qkv[0])

    def sparse() -> tuple[torch.Tensor, torch.Tensor]:
        return block_sparse_attention(*qkv, mask, rows=rows, return_lse=True)

    def with_means() -> torch.Tensor:
        return PooledResidual().attend(call, plan, sparse)[0]

    def adding(bits: int, means: bool = False) -> Callable[[], Callable[[], torch.Tensor]]:
        def make() -> Callable[[], torch.Tensor]:
            kept = LeftOut.of(MADE, dense, bits)

            def run() -> torch.Tensor:
                call.left_out = kept
                return Carried(bits=bits, means=means).attend(call, plan, sparse)[0]

            return run

        return make

    def keeping(bits: int, means: bool = False) -> Callable[[], Callable[[], torch.Tensor]]:
        return lambda: lambda: Carried(bits=bits, means=means).left_out(call, plan, dense, sparse).difference

    def check(name: str, made: Callable[[], torch.Tensor]) -> dict[str, object]:
        if name == "nothing":
            return checked(*qkv, mask, rows)(name, made)
        if name.startswith("kept"):
            return {}
        before = sparse()[0]
        if "means" in name:  # by torch, in float32
            by_torch = dict.fromkeys(("residual", "selection"), Choice("torch", BY_NAME))
            before = PooledResidual().attend(replace(call, choices=by_torch), plan, sparse)[0]
        share = 0.0 if name == "means" else 1 - (NOW.index - MADE.index) / NOW.num_steps / Carried().lasts
        plain, found = (x[:, :4096].float() for x in (before, made()))
        wanted = plain + share * dense[:, :4096].float()
        return {"error": float((found - wanted).norm() / wanted.norm())}

    makers = {"nothing": lambda: lambda: sparse()[0]}
    makers |= {"means": lambda: with_means, "carried over means, 16 bits": adding(16, means=True)}
    makers |= {f"carried, {bits} bits": adding(bits) for bits in (16, 8)}
    makers |= {"kept over means, 16 bits": keeping(16, means=True)}
    makers |= {f"kept, {bits} bits": keeping(bits) for bits in (16, 8)}
    report.turns(makers, check, "nothing", operations(qkv[0], mask), **labels)
