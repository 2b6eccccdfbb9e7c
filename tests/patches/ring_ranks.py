"""What each process of the tests of ring attention runs: tiny models on gloo, on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

import dit_accel
from dit_accel import Recipe, presets
from dit_accel.call import AttentionCall
from dit_accel.kernels import BlockMask, block_sparse_attention
from dit_accel.layout import StepContext, TokenLayout
from dit_accel.plan import AttentionPlan
from dit_accel.ring import RingPart, RingShard
from dit_accel.ring_attention import attend_around
from dit_accel.stages.precision import Int8
from dit_accel.stages.select.gate import GlobalGate
from dit_accel.stages.select.mass import FrozenMass, Mass
from dit_accel.stages.select.similarity_gate import GatedPooled
from tests.patches import ulysses_ranks
from tests.patches.ulysses_ranks import begin, end, flux, flux_given, gradients, out_of, patched, qwen, qwen_given, wan
from tests.patches.ulysses_ranks import wan_given as wan_given
from tests.peaked import BLOCK
from tests.recipes import POOLED, SMALL_TILES

SPARSE = ulysses_ranks.SPARSE | {
    "strided mass": Recipe(SMALL_TILES, Mass(density=0.3, block=BLOCK, query_stride=4)),
    "latent mass": Recipe(SMALL_TILES, FrozenMass(density=0.3, block=BLOCK)),
    "similarity": Recipe(SMALL_TILES, GatedPooled(density=0.3, top_p=None, similarity=0.05, block=BLOCK)),
    "threshold": Recipe(SMALL_TILES, GlobalGate(threshold=0.2, block=BLOCK)),
    "uneven blocks": Recipe(SMALL_TILES, replace(POOLED.select, block=(64, 32))),  # type: ignore[type-var]
    "int8": Recipe(SMALL_TILES, POOLED.select, precision=Int8(smooth_k=False)),
}


def flux_20_given() -> dict[str, Any]:
    """A prompt of which four processes have as much."""
    given = flux_given()
    given["encoder_hidden_states"] = torch.cat([given["encoder_hidden_states"]] * 2, 1)[:, :20]
    given["txt_ids"] = torch.zeros(20, 3)
    return given


MODELS = {"wan": (wan, wan_given), "flux": (flux, flux_given), "qwen-image": (qwen, qwen_given)}
UNIFIED = {"wan": (lambda: wan(4), wan_given), "flux": (flux, flux_20_given)}


def recipes_of(model: str) -> list[str]:
    """All for one model; for those with text, and with hidden keys, what treats these apart."""
    return {
        "wan": list(SPARSE),
        "flux": ["pooled", "mass", "window", "axes per head", "latent mass"],
        "qwen-image": ["pooled", "mass", "window", "latent mass"],
    }[model]


def in_ring(model: Any, ring: int, ulysses: int = 1, **options: Any) -> Any:
    model.enable_parallelism(config=ContextParallelConfig(ring_degree=ring, ulysses_degree=ulysses, **options))
    return model


def operation_inputs(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """q, k, v ``[2, 200, 2, 8]`` in float64 and a gradient, a permutation per head, a block map and a key mask."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(2, 200, 2, 8, generator=generator, dtype=torch.float64) for _ in range(4)]
    rows = torch.stack([torch.randperm(200, generator=generator) for _ in range(2)])
    keep = torch.rand(2, 2, 7, 13, generator=generator) < 0.4
    keep[:, :, 2] = False  # rows that see nothing
    keep[:, :, :, 5:9] = False  # nothing of a process' keys
    return *tensors, rows, keep


def _operation(rank: int, world: int, per_head: bool) -> list[torch.Tensor]:
    """Output, log-sum-exp of this process' slots, gradients, of attention around a ring."""
    q, k, v, grad, rows, keep = operation_inputs()
    rows = rows if per_head else rows[0]
    lengths = (90, 110) if world == 2 else (90, 60, 50)
    first = sum(lengths[:rank])
    own = slice(first, first + lengths[rank])
    ring = RingShard(dist.group.WORLD, rank, lengths, None, "test")
    part = RingPart.of(ring, rows, torch.ones(7), (32, 16), torch.device("cpu"))
    leaves = [x[:, own].clone().requires_grad_() for x in (q, k, v)]
    layout = TokenLayout((1, 10, 20), 0, 200)
    call = AttentionCall(0, StepContext(), *leaves, None, 8**-0.5, layout, ring=ring)
    call.deal(part)
    masks = BlockMask.from_dense(keep, 32, 16, 200, 200).parts(part.q_span(), [part.k_span(r) for r in range(world)])

    def attend(here: AttentionCall, plan: AttentionPlan) -> Any:
        return block_sparse_attention(
            here.q, here.k, here.v, plan.mask, key_mask=here.key_mask, scale=here.scale, return_lse=True
        )

    out, lse = attend_around(call, masks.__getitem__, attend)
    out = call.of_queries(out)
    out.backward(grad[:, own])
    return [out.detach(), lse, *[x.grad for x in leaves]]  # type: ignore[list-item]


def work(rank: int, world: int, path: Path) -> None:
    """All that one process finds, in a file."""
    begin(rank, world, path)
    found: dict[Any, Any] = {}
    for per_head in (False, True):
        found["operation", per_head] = _operation(rank, world, per_head)
    for name, (build, inputs) in MODELS.items():
        model, given = in_ring(build(), world), inputs()
        for recipe in recipes_of(name):
            found[name, recipe] = _patched(model, given, SPARSE[recipe])
    found["presets"] = ulysses_ranks.of_presets(in_ring(wan(), world))
    for name in ("wan", "flux"):
        build, inputs = MODELS[name]
        grads = gradients(in_ring(build(), world), inputs(), POOLED)
        for grad in grads:
            dist.all_reduce(grad)
        found[name, "gradients"] = grads
    model = in_ring(wan(), world)
    for block in model.blocks:
        block.compile(backend="eager")
    found["compiled"] = _patched(model, wan_given(), POOLED)
    ragged = in_ring(wan(), world, ring_anything=True)
    for recipe in ("pooled", "mass"):
        found["anything", recipe] = _patched(ragged, wan_given(*RAGGED), SPARSE[recipe])
    pipe = ulysses_ranks.wan_pipeline()
    in_ring(pipe.transformer, world)
    out, summary = ulysses_ranks.run_pipeline(pipe)
    found["pipeline"] = out, summary.sparse_calls, summary.dense_calls
    found["refused"] = _refusals(world)
    end(rank, path, found)


# Frames, height and width of latents whose tokens no two or three processes share evenly.
RAGGED = (5, 14, 10)


def unified(rank: int, world: int, path: Path) -> None:
    """Two rings of two."""
    begin(rank, world, path)
    found: dict[Any, Any] = {}
    for name, (build, inputs) in UNIFIED.items():
        model = in_ring(build(), 2, 2)
        for recipe in ("pooled", "mass", "window"):
            found[name, recipe] = _patched(model, inputs(), SPARSE[recipe])
    grads = gradients(in_ring(wan(4), 2, 2), wan_given(), POOLED)
    for grad in grads:
        dist.all_reduce(grad)
    found["gradients"] = grads
    end(rank, path, found)


def _patched(model: Any, given: dict[str, Any], recipe: Recipe) -> tuple[torch.Tensor, Any]:
    with dit_accel.patch(model, recipe) as handle:
        out = out_of(model, given)
        return out, handle.summary()


def _refusals(world: int) -> dict[str, str]:
    """Sentences of what cannot run, by what it is."""
    said = {}
    for name, asked in (
        ("select", presets.psa()),
        ("compensate", presets.agent()),
        ("order", presets.pbs()),
        ("blocks", Recipe(SMALL_TILES, replace(POOLED.select, block=(128, 128)))),  # type: ignore[type-var]
    ):
        try:
            patched(in_ring(wan(), world), wan_given(1 if name == "blocks" else 3), asked)
        except ValueError as error:
            said[name] = str(error)
    try:
        patched(in_ring(qwen(), world), qwen_given(), SPARSE["axes per head"])
    except ValueError as error:
        said["order per head"] = str(error)
    return said
