"""What each process of the tests of Ulysses runs: tiny models on gloo, on the CPU."""

from __future__ import annotations

import datetime
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import ContextParallelConfig, FluxTransformer2DModel, QwenImageTransformer2DModel, WanTransformer3DModel
from diffusers.hooks import context_parallel
from torch import nn

import dit_accel
from dit_accel import Recipe, presets
from dit_accel.process_group import load_group_defaults
from dit_accel.stages.order.axes import AxisOrder
from dit_accel.stages.precision import Int8
from dit_accel.stages.select.mass import Mass
from dit_accel.stages.select.pooled import Pooled
from tests.peaked import BLOCK, RECIPES, peaked, peaked_pipeline
from tests.recipes import POOLED, SMALL_TILES, WINDOW
from tests.tiny import TINY
from tests.tiny_registry import MODELS as REGISTRY

TIMEOUT = 300.0
SPARSE = {
    "pooled": POOLED,
    "mass": Recipe(SMALL_TILES, Mass(density=0.3, block=BLOCK)),
    "one budget": Recipe(SMALL_TILES, Mass(0.3, False, block=BLOCK, score="error", budget="layer")),
    "window": WINDOW,
    "densities per head": Recipe(SMALL_TILES, Pooled(head_densities=((0.2, 0.3, 0.4, 0.5, 0.6, 0.9),), block=BLOCK)),
    "axes per head": Recipe(AxisOrder((("fhw", "hwf", "wfh", "fwh", "hfw", "whf"),)), Pooled(density=0.4, block=BLOCK)),
}


def ended(world: int, work: Callable[..., None], path: Path, *arguments: Any) -> list[int | None]:
    """Exit codes of ``work(rank, world, path, *arguments)`` in as many processes; None for one that did not end."""
    # What forks them has imported this module once: imports take ten seconds for each process on a slow machine.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ranks = [context.Process(target=work, args=(rank, world, path, *arguments)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    try:
        for rank in ranks:
            rank.join(TIMEOUT)
        return [rank.exitcode for rank in ranks]
    finally:
        for rank in ranks:
            if rank.is_alive():
                rank.kill()
            rank.join()


def found_by(world: int, work: Callable[..., None], path: Path) -> list[dict[Any, Any]]:
    """What each of as many processes left in ``path`` as ``RANK.pt``; all ended well."""
    assert ended(world, work, path) == [0] * world
    return [torch.load(path / f"{rank}.pt", weights_only=False) for rank in range(world)]


def begin(rank: int, world: int, path: Path) -> None:
    torch.set_num_threads(1)
    load_group_defaults()
    # enable_parallelism divides by it, and a CPU has none.
    torch.accelerator.device_count = lambda: world
    # Gloo gathers no tensors of different lengths, NCCL does.
    context_parallel._all_gather_anything = _gather_ragged
    store = dist.FileStore(str(path / "store"), world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=TIMEOUT / 2)
    )


def end(rank: int, path: Path, found: dict[Any, Any]) -> None:
    """What this process found, in a file; then it parts from the others, and ends."""
    torch.save(found, path / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    # The meshes of a model that lives on have groups with threads, over which an interpreter that ends may fall.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _gather_ragged(tensor: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
    lengths: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(lengths, tensor.shape[dim], group=group)
    padded = tensor.new_zeros(*tensor.shape[:dim], max(lengths), *tensor.shape[dim + 1 :])
    padded.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part.narrow(dim, 0, length) for part, length in zip(parts, lengths, strict=True)], dim)


def in_parallel(model: Any, world: int, **options: Any) -> Any:
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world, **options))
    return model


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def _filled(model: nn.Module) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.any()):
                parameter.normal_(std=0.1)
    return peaked(model.double())


def wan(heads: int = 6) -> Any:
    torch.manual_seed(0)
    return _filled(
        WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=heads,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=64,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )
    )


def wan_given(frames: int = 3, height: int = 24, width: int = 16) -> dict[str, Any]:
    return {
        "hidden_states": _randn(2, 4, frames, height, width),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": _randn(2, 12, 16),
    }


def flux() -> Any:
    torch.manual_seed(0)
    return _filled(
        FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=6,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=[4, 4, 8],
        )
    )


def flux_given() -> dict[str, Any]:
    ids = torch.zeros(168, 3)
    ids[:, 1:] = torch.cartesian_prod(torch.arange(14), torch.arange(12))
    return {
        "hidden_states": _randn(1, 168, 4),
        "encoder_hidden_states": _randn(1, 18, 32),
        "pooled_projections": _randn(1, 32),
        "timestep": torch.tensor([0.5]).double(),
        "img_ids": ids,
        "txt_ids": torch.zeros(18, 3),
    }


def qwen() -> Any:
    torch.manual_seed(0)
    return _filled(
        QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=6,
            joint_attention_dim=16,
            guidance_embeds=False,
            axes_dims_rope=(8, 4, 4),
        )
    )


def qwen_given() -> dict[str, Any]:
    mask = torch.ones(1, 18, dtype=torch.bool)
    mask[:, 11:] = False
    return {
        "hidden_states": _randn(1, 168, 16),
        "encoder_hidden_states": _randn(1, 18, 16),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.tensor([0.5]).double(),
        "img_shapes": [[(1, 14, 12)]],
    }


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "wan": (wan, wan_given),
    "flux": (flux, flux_given),
    "qwen-image": (qwen, qwen_given),
}


def out_of(model: Any, given: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**given, return_dict=False)[0]


def patched(model: Any, given: dict[str, Any], recipe: Recipe | str) -> tuple[torch.Tensor, Any]:
    """Output and summary."""
    with dit_accel.patch(model, recipe) as handle:
        return out_of(model, given), handle.summary()


def of_presets(model: Any) -> dict[str, torch.Tensor | str]:
    """Output under every sparse preset that plans online, or the sentence that refuses it."""
    found: dict[str, torch.Tensor | str] = {}
    for name in presets.PRESETS:
        recipe = presets.resolve(name)
        if recipe.order.needs_calibration or recipe.select.is_dense:
            continue
        try:
            found[name] = patched(model, wan_given(), name)[0]
        except ValueError as error:
            found[name] = str(error)
    return found


def assert_presets(found: dict[str, Any], refused: tuple[str, ...] = ()) -> None:
    """Each preset gives what one process gives; those that are refused say what to take."""
    alone, dense = of_presets(wan()), patched(wan(), wan_given(), "dense")[0]
    assert found.keys() == alone.keys()
    assert {name for name, out in found.items() if isinstance(out, str)} == set(refused)
    for name, out in found.items():
        if name in refused:
            assert "use ulysses_degree in place of ring_degree" in out, name
            continue
        one: Any = alone[name]
        bound = 1e-11 * one.abs().max()
        if isinstance(presets.resolve(name).precision, Int8):
            # Keys are smoothed by the mean of those at hand, so that other numbers are rounded: either result is as
            # far from dense attention as 8 bits are.
            bound = 2 * (one - dense).abs().max()
        assert (out - one).abs().max() < bound, name


def gradients(model: Any, given: dict[str, Any], recipe: Recipe | str) -> list[torch.Tensor]:
    with dit_accel.patch(model, recipe):
        out = model(**given, return_dict=False)[0]
        out.square().sum().backward()
    return [p.grad for p in model.parameters()]


def run_pipeline(pipe: Any) -> tuple[torch.Tensor, Any]:
    with dit_accel.patch(pipe, RECIPES["adaspa"]) as handle:
        return TINY["wan"].run(pipe, steps=5), handle.summary()


def wan_pipeline() -> Any:
    pipe = TINY["wan"].build()
    pipe.transformer.double()
    return peaked_pipeline(pipe)


def work(rank: int, world: int, path: Path) -> None:
    """All that one process finds, in a file."""
    begin(rank, world, path)
    found: dict[str, Any] = {}
    for name, (build, inputs) in MODELS.items():
        model, given = in_parallel(build(), world), inputs()
        plain = out_of(model, given)
        dense, summary = patched(model, given, "dense")
        found[name, "dense"] = torch.equal(plain, dense), summary.dense_calls, summary.parallel
        for recipe, asked in SPARSE.items():
            out, summary = patched(model, given, asked)
            found[name, recipe] = out, summary.dense_calls, summary.sparse_calls, summary.density, summary.parallel
        found[name, "unpatched again"] = torch.equal(plain, out_of(model, given))
    found["presets"] = of_presets(in_parallel(wan(), world))
    for name in ("wan", "flux"):
        build, inputs = MODELS[name]
        grads = gradients(in_parallel(build(), world), inputs(), POOLED)
        for grad in grads:
            dist.all_reduce(grad)
        found[name, "gradients"] = grads
    heads, tokens = _RAGGED[world]
    model, given = in_parallel(wan(heads), world, ulysses_anything=True), wan_given(*tokens)
    plain = out_of(model, given)
    found["anything", "dense"] = torch.equal(plain, patched(model, given, "dense")[0])
    for recipe in ("pooled", "mass"):
        out, summary = patched(model, given, SPARSE[recipe])
        found["anything", recipe] = out, summary.sparse_calls, summary.parallel
    if world == 2:
        for name in REGISTERED:
            found["registered", name] = _registered(name, world)
        pipe = wan_pipeline()
        in_parallel(pipe.transformer, world)
        out, summary = run_pipeline(pipe)
        found["pipeline"] = out, summary.sparse_calls, summary.dense_calls
    found["refused"] = _refusals(world)
    end(rank, path, found)


# Of the other tiny models with a plan of diffusers: two heads, odd lengths, references.
REGISTERED = ("chronoedit", "flux2", "minimax-h3")


def _registered(name: str, world: int) -> tuple[bool, torch.Tensor]:
    """Whether a patch with "dense" is equal to none, and the output of sparse attention."""
    tiny = REGISTRY[name]
    model = in_parallel(tiny.build(), world, ulysses_anything=True)
    plain = tiny.run(model)
    with dit_accel.patch(model, "dense"):
        equal = torch.equal(tiny.run(model), plain)
    with dit_accel.patch(model, POOLED):
        return equal, tiny.run(model)


# Heads and latent size that so many processes cannot share evenly.
_RAGGED = {2: (3, (3, 14, 10)), 3: (5, (3, 14, 22))}


def _refusals(world: int) -> dict[str, str]:
    """Sentences of what cannot run, by what it is."""
    said = {}
    for name, heads, options in (
        ("heads", 5 if world == 2 else 4, {}),
        ("no head", 1 if world == 2 else 4, {"ulysses_anything": True}),
    ):
        try:
            patched(in_parallel(wan(heads), world, **options), wan_given(), POOLED)
        except ValueError as error:
            said[name] = str(error)
    return said


def fail(rank: int, world: int, path: Path, kind: str) -> None:
    """One process ends in the middle of a forward.

    Args:
        kind: "killed", "raised", "ring" (raised, under ring attention), or "compiled" (raised, in one graph of all).
    """
    begin(rank, world, path)
    degree = {"ring_degree" if kind == "ring" else "ulysses_degree": world}
    model: Any = wan()
    model.enable_parallelism(config=ContextParallelConfig(**degree))
    with dit_accel.patch(model, POOLED) as handle:

        def tap(layer: int, out: torch.Tensor, _dense: Any) -> torch.Tensor:
            if rank == 1 and layer == 1:
                if kind == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError("this rank fails")
            return out

        call = torch.compile(model, backend="eager") if kind == "compiled" else model
        with handle.tap_outputs(tap):
            try:
                out_of(call, wan_given())
            except RuntimeError as error:
                lines = [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]
                (path / f"said{rank}.txt").write_text("\n".join(lines))
                raise
    sys.exit(0)
