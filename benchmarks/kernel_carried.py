"""A sparse call with and without what ``compensate=carried`` adds to it, blocks of 64 x 64: a section of kernels.py.

The addition follows the kernel: the output is read and written once more, and the kept difference read: 6 bytes a
value in bfloat16, 5 where 8 bits are kept, and a kernel that added it itself would need 2. "kept" is what a dense step
costs beside its plan: a sparse call and the difference from it. "means" is ``compensate=residual``: means are pooled,
the plan's lists packed, and the launch of the kept blocks attends the means too; "means, two launches" goes on over
them in a second one. "over means" is both, ``compensate.means=True``.

"made: ..." are of means and bits that are there already, in blocks of 64 x 64 and in those of the presets, 128 x 64.
Expected of one launch at 32,760 tokens and density 0.2: 8 steps of means beside 102 listed ones, each of 1.25 times
their instructions, so 1.08 to 1.11 times a call without means, where two launches were seen to take 1.16 times.

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
from dit_accel.kept_attention import attend_kept
from dit_accel.kernels import BlockMask
from dit_accel.kernels.attention.means import LeftOutMeans
from dit_accel.kernels.common.choice import BY_NAME, Choice
from dit_accel.layout import StepContext, TokenLayout
from dit_accel.plan import AttentionPlan, LeftOut
from dit_accel.run import Run
from dit_accel.stages.compensate.carried import Carried
from dit_accel.stages.compensate.residual import PooledResidual
from dit_accel.stages.order.simple import Tiles, tile_order
from dit_accel.stages.precision import Attended, ModelDtype

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
            for block_q in (64, 128):
                mask = pair_mask(args.heads, length, block_q, density, 0.0, q.device)
                compare_launches(report, (q, k, v), grid, mask, rows, {**labels, "block": f"{block_q}x64"})


class OneLaunch(ModelDtype):
    """Whose kernels are given means, also where that is switched off."""

    def why_not_means(self, *_: object) -> None:
        return None


class TwoLaunches(ModelDtype):
    """Whose kernels are given no means."""

    def why_not_means(self, *_: object) -> str:
        return "so that it can be timed"


def backend_of(call: AttentionCall, _plan: AttentionPlan) -> str:
    return call.backend("attention")


def call_of(qkv: tuple[torch.Tensor, ...], grid: tuple[int, int, int]) -> AttentionCall:
    """A call as an engine has it, its backends chosen."""
    call = AttentionCall.of(0, AttentionInputs(*qkv), TokenLayout(grid, 0, qkv[0].shape[1]), NOW, Run())
    backend = Choice("triton" if call.q.is_cuda else "torch", BY_NAME)
    call.choices = dict.fromkeys(("attention", "residual", "selection"), backend)
    return call


def compare_launches(
    report: Report, qkv: tuple[torch.Tensor, ...], grid: tuple[int, int, int], mask: BlockMask, rows, labels
) -> None:
    """Attention to kept blocks, with means in its launch and in one behind it, in turns; means and bits are there."""
    call, plan, found = call_of(qkv, grid), AttentionPlan(rows, mask), []

    def remember(means: LeftOutMeans | None = None) -> Attended:
        found.append(means)
        return qkv[0], qkv[0]

    PooledResidual().attend(call, plan, remember)
    (means,) = found
    by_torch = replace(means, backend="torch")
    wanted = attend_kept(call, plan, TwoLaunches(), backend_of, True, by_torch)[0].float()

    def with_means(precision: ModelDtype) -> Callable[[], Callable[[], torch.Tensor]]:
        return lambda: lambda: attend_kept(call, plan, precision, backend_of, True, means)[0]

    def check(name: str, made: Callable[[], torch.Tensor]) -> dict[str, object]:
        if name == "made: nothing":
            return {}
        return {"error": float((made().float() - wanted).norm() / wanted.norm())}

    makers = {
        "made: nothing": lambda: lambda: attend_kept(call, plan, ModelDtype(), backend_of, True, None)[0],
        "made: two launches": with_means(TwoLaunches()),
    }
    if call.q.is_cuda:
        makers["made: one launch"] = with_means(OneLaunch())
    report.turns(makers, check, "made: nothing", operations(qkv[0], mask), **labels)


def compare(
    report: Report, qkv: tuple[torch.Tensor, ...], grid: tuple[int, int, int], mask: BlockMask, rows, labels
) -> None:
    """All of them in turns."""
    call, plan = call_of(qkv, grid), AttentionPlan(rows, mask)
    dense = torch.randn_like(qkv[0])

    def sparse(means: LeftOutMeans | None = None) -> Attended:
        precision = OneLaunch() if call.q.is_cuda else TwoLaunches()
        return attend_kept(call, plan, precision, backend_of, True, means)

    def sparse_first(means: LeftOutMeans | None = None) -> Attended:
        return attend_kept(call, plan, TwoLaunches(), backend_of, True, means)

    def with_means() -> torch.Tensor:
        return PooledResidual().attend(call, plan, sparse)[0]

    def with_means_behind() -> torch.Tensor:
        return PooledResidual().attend(call, plan, sparse_first)[0]

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
            before = PooledResidual().attend(replace(call, choices=by_torch), plan, sparse_first)[0]
        share = 0.0 if name.startswith("means") else 1 - (NOW.index - MADE.index) / NOW.num_steps / Carried().lasts
        plain, found = (x[:, :4096].float() for x in (before, made()))
        wanted = plain + share * dense[:, :4096].float()
        return {"error": float((found - wanted).norm() / wanted.norm())}

    makers = {"nothing": lambda: lambda: sparse()[0]}
    makers |= {"means": lambda: with_means, "means, two launches": lambda: with_means_behind}
    makers |= {"carried over means, 16 bits": adding(16, means=True)}
    makers |= {f"carried, {bits} bits": adding(bits) for bits in (16, 8)}
    makers |= {"kept over means, 16 bits": keeping(16, means=True)}
    makers |= {f"kept, {bits} bits": keeping(bits) for bits in (16, 8)}
    report.turns(makers, check, "nothing", operations(qkv[0], mask), **labels)
