"""What each process of the tests of training in parallel runs: a tiny Wan and a tiny FLUX on gloo, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.checkpoint import checkpoint

import dit_accel
from dit_accel import Recipe
from dit_accel.patches.forwards import KeptForwards
from dit_accel.patches.learned import is_learned
from dit_accel.stages.compensate.clipped import ClippedSoftmax
from dit_accel.stages.compensate.coarse import CoarseBranch
from dit_accel.stages.compensate.linear import LinearBranch
from dit_accel.stages.compensate.output_gate import OutputGate
from dit_accel.stages.compensate.routed_heads import RoutedHeads
from dit_accel.stages.order.cubes import Cubes
from dit_accel.stages.select.learned import Learned
from dit_accel.stages.select.mass import Mass
from dit_accel.stages.select.pooled import Pooled
from tests.patches.ulysses_ranks import begin, end, flux, flux_given, wan, wan_given
from tests.peaked import BLOCK
from tests.recipes import POOLED, SMALL_TILES

KINDS = {"ulysses": "ulysses_degree", "ring": "ring_degree"}
_POOLED = Pooled(density=0.4, block=BLOCK)
SLA = Recipe(SMALL_TILES, _POOLED, LinearBranch())
LEARNED = {
    "sla": SLA,
    "all tokens": Recipe(SMALL_TILES, _POOLED, LinearBranch(form="all_tokens")),
    "hedgehog": Recipe(SMALL_TILES, _POOLED, LinearBranch(feature_map="hedgehog", form="non_critical")),
    "clipped softmax": Recipe(SMALL_TILES, _POOLED, ClippedSoftmax()),
    "output gate": Recipe(SMALL_TILES, _POOLED, OutputGate()),
    "routed heads": Recipe(SMALL_TILES, _POOLED, RoutedHeads(0.6)),
    # Of a padded sequence: the grid is ragged.
    "coarse": Recipe(Cubes((2, 4, 4)), Pooled(density=0.4, block=BLOCK, keep_own=False), CoarseBranch()),
    "seer": Recipe(SMALL_TILES, Learned(density=0.4, block=BLOCK)),
    "seer, linear": Recipe(SMALL_TILES, Learned(density=0.4, block=BLOCK, form="linear")),
}
MASS = Recipe(SMALL_TILES, Mass(density=0.3, block=BLOCK))
MODELS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "wan": (wan, wan_given),
    "flux": (flux, flux_given),
}
# Of a model whose text comes interleaved what treats tokens apart: gates, and masks of latents.
RECIPES_OF = {"wan": tuple(LEARNED), "flux": ("sla", "output gate", "coarse", "routed heads")}

Found = tuple[torch.Tensor, dict[str, torch.Tensor], Any]


def train(
    model: Any,
    given: dict[str, Any],
    recipe: Recipe,
    *,
    checkpointing: str = "",
    shards: bool = False,
    compiled: str = "",
) -> Found:
    """Output, gradients by name and summary of one forward and backward.

    Args:
        checkpointing: "reentrant", "as stored", or nothing.
        shards: weights are shared out by FSDP2, and gradients summed over the processes.
        compiled: "blocks", "whole", or nothing.
    """
    with dit_accel.patch(model, recipe) as handle:
        generator = torch.Generator().manual_seed(0)
        model.double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.requires_grad_()
                if is_learned(name):
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        if checkpointing:
            again = partial(checkpoint, use_reentrant=checkpointing == "reentrant")
            model.enable_gradient_checkpointing(again)
        if shards:
            share_out(model)
        if compiled == "blocks":
            for block in model.blocks:
                block.compile(backend="aot_eager")
        call = torch.compile(model, backend="aot_eager") if compiled == "whole" else model
        # A block repeats what requires a gradient: of the reentrant kind its input must.
        given = given | {"hidden_states": given["hidden_states"].clone().requires_grad_()}
        out = call(**given, return_dict=False)[0]
        out.square().sum().backward()
        grads = {name: _whole(parameter) for name, parameter in model.named_parameters()}
        return out.detach(), grads, handle.summary()


def share_out(model: Any) -> None:
    """Shards of blocks and of the rest, whose gradients are summed: each process has those of its own tokens."""
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)


def _whole(parameter: Any) -> torch.Tensor:
    grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).detach()


def _shared(kind: str, world: int, build: Callable[[], Any], **options: Any) -> Any:
    model = build()
    model.enable_parallelism(config=ContextParallelConfig(**{KINDS[kind]: world}, **options))
    return model


def _summed(found: Found) -> Found:
    for grad in found[1].values():
        dist.all_reduce(grad)
    return found


def work(rank: int, world: int, path: Path) -> None:
    """All that one process finds, in a file."""
    begin(rank, world, path)
    found: dict[Any, Any] = {}
    for name, (build, inputs) in MODELS.items():
        for recipe in RECIPES_OF[name]:
            model = _shared("ulysses", world, build)
            found["learned", name, recipe] = _summed(train(model, inputs(), LEARNED[recipe]))
    for kind in KINDS:
        for recipe, asked in (("pooled", POOLED), ("mass", MASS)):
            for how in ("as stored", "reentrant"):
                model = _shared(kind, world, wan)
                trained = train(model, wan_given(), asked, checkpointing=how)
                found["checkpointing", kind, recipe, how] = _summed(trained)
    heads, size = RAGGED[world]
    model = _shared("ulysses", world, lambda: wan(heads), ulysses_anything=True)
    found["anything"] = _summed(train(model, wan_given(*size), SLA, checkpointing="as stored"))
    for kind, asked in SHARDED.items():
        for how in ("", "as stored"):
            model = _shared(kind, world, wan)
            with _recognised():
                found["sharded", kind, how] = train(model, wan_given(), asked, checkpointing=how, shards=True)
    end(rank, path, found)


@contextmanager
def _recognised() -> Iterator[None]:
    """Fail where a repeated block is only guessed: with a second forward of as many tokens it would be refused."""
    guess = KeptForwards.alike

    def refuse(*_given: Any) -> None:
        raise AssertionError("a repeated block was not recognised by its input")

    KeptForwards.alike = refuse  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        KeptForwards.alike = guess  # type: ignore[method-assign]


def groups(rank: int, world: int, path: Path) -> None:
    """Two processes for each of two samples, and weights that all share out."""
    begin(rank, world, path)
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("samples", "ring", "ulysses"))
    model = _shared("ulysses", 2, wan, mesh=mesh)
    given = sample(rank // 2)
    end(rank, path, {"groups": train(model, given, SLA, checkpointing="as stored", shards=True)})


def sample(number: int) -> dict[str, Any]:
    given = wan_given()
    return given | {"hidden_states": given["hidden_states"].roll(number, -1)}


def compiled(rank: int, world: int, path: Path) -> None:
    """What one process finds of compiled code, in a file."""
    begin(rank, world, path)
    found: dict[Any, Any] = {}
    for name, (kind, asked) in COMPILED.items():
        for how in ("blocks", "whole"):
            found[name, how] = _summed(train(_shared(kind, world, wan), wan_given(), asked, compiled=how))
    end(rank, path, found)


COMPILED = {"ulysses": ("ulysses", SLA), "ring": ("ring", POOLED)}
# Heads and latent size that so many processes cannot share evenly.
RAGGED = {2: (3, (3, 14, 10)), 3: (5, (3, 14, 22))}
SHARDED = {"ulysses": SLA, "ring": SLA}
