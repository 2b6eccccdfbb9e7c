"""What each process of the tests of compensations around a ring runs: tiny models on gloo, on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import dit_accel
from dit_accel import Recipe
from dit_accel.kernels import BlockMask
from dit_accel.kernels.linear.api import add_linear_branch, plus_linear_branch
from dit_accel.ring import RingPart, RingShard
from dit_accel.ring_sums import RingBlockSums, RingSums
from dit_accel.stages.compensate.carried import Carried
from dit_accel.stages.compensate.clipped import ClippedSoftmax
from dit_accel.stages.compensate.coarse import CoarseBranch
from dit_accel.stages.compensate.linear import LinearBranch
from dit_accel.stages.compensate.output_gate import OutputGate
from dit_accel.stages.compensate.pyramid import KeyPyramid
from dit_accel.stages.compensate.residual import PooledResidual
from dit_accel.stages.compensate.routed_heads import RoutedHeads
from dit_accel.stages.order.cubes import Cubes
from dit_accel.stages.schedule import Schedule
from dit_accel.stages.select.learned import Learned
from dit_accel.stages.select.mass import Mass
from dit_accel.stages.select.pooled import Pooled
from dit_accel.stages.select.static import Window
from tests.patches import ulysses_ranks
from tests.patches.ring_ranks import RAGGED, UNIFIED, in_ring
from tests.patches.trained_ranks import Found, train
from tests.patches.ulysses_ranks import begin, end, flux, flux_given, patched, qwen, qwen_given, wan, wan_given
from tests.peaked import BLOCK
from tests.recipes import SMALL_TILES
from tests.tiny import TINY

POOLED = Pooled(density=0.4, block=BLOCK)
LEARNED = {
    "paper": Recipe(SMALL_TILES, POOLED, LinearBranch(negligible_share=0.3)),
    "not selected, hedgehog": Recipe(SMALL_TILES, POOLED, LinearBranch("non_critical", "hedgehog")),
    "all tokens": Recipe(SMALL_TILES, POOLED, LinearBranch("all_tokens")),
    "all tokens, elu": Recipe(SMALL_TILES, replace(POOLED, block=(64, 32)), LinearBranch("all_tokens", "elu")),
    # Each head has an order of its own.
    "axes per head": Recipe(ulysses_ranks.SPARSE["axes per head"].order, POOLED, LinearBranch("non_critical")),
    "coarse, axes per head": Recipe(ulysses_ranks.SPARSE["axes per head"].order, POOLED, CoarseBranch()),
    "output gate": Recipe(SMALL_TILES, POOLED, OutputGate()),
    # Of a padded sequence: the grid is ragged.
    "coarse": Recipe(Cubes((2, 4, 4)), replace(POOLED, keep_own=False), CoarseBranch()),
    "clipped softmax": Recipe(SMALL_TILES, POOLED, ClippedSoftmax()),
    "routed heads": Recipe(SMALL_TILES, POOLED, RoutedHeads(0.6)),
    "uneven blocks, relu": Recipe(SMALL_TILES, replace(POOLED, block=(64, 32)), LinearBranch("paper", "relu")),
}
INFERENCE = {
    "residual": Recipe(SMALL_TILES, POOLED, PooledResidual()),
    "residual of 8": Recipe(SMALL_TILES, replace(POOLED, block=(64, 32)), PooledResidual(tokens=8)),
    "learned blocks": Recipe(SMALL_TILES, Learned(density=0.4, block=BLOCK)),
    "values": Recipe(SMALL_TILES, Learned(density=0.4, block=BLOCK, form="values")),
}
# Dense: the first step, and those that search.
SCHEDULE = Schedule(dense_fraction=0.2, refresh_at=(0.2, 0.6), dense_refresh=True, refresh_every=2)
CARRIED = {
    name: Recipe(SMALL_TILES, select, Carried(means=means), schedule=SCHEDULE)
    for name, select, means in (
        ("window", Window(window=(1.0, 0.5, 0.5), block=BLOCK), False),
        ("mass", Mass(density=0.3, block=BLOCK), False),
        ("mass, over means", Mass(density=0.3, block=BLOCK), True),
    )
}
# With text that comes interleaved, and with hidden keys.
MODELS = {"wan": (wan, wan_given), "flux": (flux, flux_given), "qwen-image": (qwen, qwen_given)}
RECIPES_OF = {
    "wan": tuple(LEARNED),
    "flux": ("paper", "all tokens", "output gate", "coarse", "routed heads", "coarse, axes per head"),
    "qwen-image": ("paper", "all tokens", "coarse", "clipped softmax"),
}


def summed(found: Found) -> Found:
    for grad in found[1].values():
        dist.all_reduce(grad)
    return found


def branch_inputs() -> dict[str, torch.Tensor]:
    """A call of 200 tokens in a permuted order, some of them hidden; blocks that are critical and negligible."""
    generator = torch.Generator().manual_seed(0)
    given = {name: torch.randn(2, 200, 3, 16, generator=generator) for name in ("q", "k", "v", "grad")}
    given["weight"] = torch.randn(16, 16, generator=generator) / 4
    given["bias"] = torch.randn(16, generator=generator)
    given["rows"] = torch.randperm(200, generator=generator)
    given["key_mask"] = torch.rand(2, 200, generator=generator) > 0.2
    given["critical"] = torch.rand(2, 3, 7, 7, generator=generator) < 0.3
    given["critical"][:, :, :, 3:] = True  # nothing of a process' keys
    given["critical"][:, :, 5] = torch.rand(2, 3, 7, generator=generator) < 0.3
    given["negligible"] = torch.rand(2, 3, 7, 7, generator=generator) < 0.2
    return given


EPS = {"blocks": 0.0, "all tokens": 1e-5}


def branch(rank: int, world: int, backend: str, form: str) -> list[torch.Tensor]:
    """Output, the same without gradients, and gradients of q, k, v, weight and bias, of the linear branch around a
    ring."""
    given = branch_inputs()
    lengths = (90, 110) if world == 2 else (90, 60, 50)
    own = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    ring = RingShard(dist.group.WORLD, rank, lengths, None, "test")
    part = RingPart.of(ring, given["rows"], torch.ones(7), (32, 32), torch.device("cpu"))
    q, k, v = (given[name][:, own].clone().requires_grad_() for name in ("q", "k", "v"))
    weight, bias = (given[name].clone().requires_grad_() for name in ("weight", "bias"))
    masks: list[BlockMask | None] = [None, None]
    if form == "blocks":
        whole = [BlockMask.from_dense(given[name], 32, 32, 200, 200) for name in ("critical", "negligible")]
        masks = [mask.parts(slice(0, 7), [part.k_span(rank)])[0] for mask in whole]
    there = [exchange.there(x) for exchange, x in ((part.queries, q), (part.keys, k), (part.keys, v))]
    options: dict[str, Any] = {
        "negligible": masks[1],
        "key_mask": part.key_mask_of(rank, given["key_mask"]),
        "eps": EPS[form],
        "backend": backend,
        "shared": (RingBlockSums if form == "blocks" else RingSums)(part),
    }
    out = part.queries.back(plus_linear_branch(torch.zeros_like(there[0]), *there, masks[0], weight, bias, **options))
    out.backward(given["grad"][:, own])
    # The same without gradients takes another way.
    there = [x.detach() for x in there]
    alike = part.queries.back(
        add_linear_branch(torch.zeros_like(there[0]), *there, masks[0], weight.detach(), bias.detach(), **options)
    )
    grads = [x.grad for x in (q, k, v, weight, bias)]
    for grad in grads[3:]:
        dist.all_reduce(grad)
    return [out.detach(), alike, *grads]  # type: ignore[list-item]


def work(rank: int, world: int, path: Path) -> None:
    """All that one process finds, in a file."""
    begin(rank, world, path)
    found: dict[Any, Any] = {}
    for name, (build, inputs) in MODELS.items():
        for recipe in RECIPES_OF[name]:
            found[name, recipe] = summed(train(in_ring(build(), world), inputs(), LEARNED[recipe]))
        for recipe, asked in INFERENCE.items():
            found[name, recipe] = patched(in_ring(build(), world), inputs(), asked)
    ragged = wan_given(*RAGGED)
    for recipe in ("paper", "coarse", "output gate"):
        found["anything", recipe] = summed(train(in_ring(wan(), world, ring_anything=True), ragged, LEARNED[recipe]))
    for how in ("as stored", "reentrant"):
        trained = train(in_ring(wan(), world), wan_given(), LEARNED["paper"], checkpointing=how)
        found["checkpointing", how] = summed(trained)
    for select in CARRIED:
        pipe = ulysses_ranks.wan_pipeline()
        in_ring(pipe.transformer, world)
        found["carried", select] = run(pipe, CARRIED[select])
    found["refused"] = refusal(world, Recipe(SMALL_TILES, POOLED, KeyPyramid()))
    found["refused", "form"] = refusal(world, Recipe(SMALL_TILES, Learned(density=0.4, block=BLOCK, form="linear")))
    for form in EPS:
        found["branch", "torch", form] = branch(rank, world, "torch", form)
    if world == 2 and not torch.cuda.is_available():  # else Triton is not interpreted
        found["branch", "triton", "all tokens"] = branch(rank, world, "triton", "all tokens")
        with mock.patch("dit_accel.kernels.linear.triton.forward.STATE_BYTES", 0):  # head by head
            found["branch", "triton", "blocks"] = branch(rank, world, "triton", "blocks")
    end(rank, path, found)


def run(pipe: Any, recipe: Recipe) -> tuple[torch.Tensor, Any]:
    """Latents and summary of a run of a few steps."""
    with dit_accel.patch(pipe, recipe) as handle:
        return TINY["wan"].run(pipe, steps=6), handle.summary()


def refusal(world: int, recipe: Recipe) -> str:
    """What is said of a recipe that cannot go around a ring."""
    try:
        patched(in_ring(wan(), world), wan_given(), recipe)
    except ValueError as error:
        return str(error)
    return ""


def compiled(rank: int, world: int, path: Path) -> None:
    """What one process finds of compiled code, in a file."""
    begin(rank, world, path)
    found: dict[Any, Any] = {}
    for recipe in COMPILED:
        for how in ("blocks", "whole"):
            trained = train(in_ring(wan(), world), wan_given(), LEARNED[recipe], compiled=how)
            found[recipe, how] = summed(trained)
    end(rank, path, found)


def unified(rank: int, world: int, path: Path) -> None:
    """Two rings of two."""
    begin(rank, world, path)
    found: dict[Any, Any] = {}
    for name, (build, inputs) in UNIFIED.items():
        for recipe in SHARED_TWICE:
            found[name, recipe] = summed(train(in_ring(build(), 2, 2), inputs(), LEARNED[recipe]))
    end(rank, path, found)


COMPILED = ("paper", "output gate")
# Of parameters for each head, of a gate, and of what compares heads.
SHARED_TWICE = ("not selected, hedgehog", "output gate", "routed heads")
