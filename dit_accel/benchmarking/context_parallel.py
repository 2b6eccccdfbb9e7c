"""Time one transformer forward on one device and shared out among several, dense and patched, in turns.

``dit-accel bench --context-parallel`` starts this module through torchrun: ``python -m
dit_accel.benchmarking.context_parallel settings.json found.json``. Every process measures both ways, so that a machine
that slows down slows all alike; the first writes what was found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..api import patch
from ..patches.targets import repeated_blocks
from ..pipelines.architectures import architecture
from ..process_group import load_group_defaults
from ..quality.turns import in_turns, speed_up
from ..recipe import Recipe
from .forward import Variant, dense_attention, restored_dense_backend, share_weights

# Of a tiny model on a busy machine; processes that wait for each other longer hang.
_TIMEOUT = 3600.0


@dataclass(frozen=True)
class Shared:
    """What to measure.

    Attributes:
        arch: name of an architecture.
        width, height, frames: pixel size of the clip.
        ring, ulysses: processes around a ring, and those that share heads; their product is the number of processes.
        recipe: as plain data; None for the automatic one.
        dtype: name in torch.
        device: "cuda" or "cpu".
        batch, layers, repeats, backend, compiled: see :func:`~dit_accel.benchmarking.forward.bench_forward`.
        dense_backend: attention of the dense variants, by diffusers' name.
        dense: whether dense forwards are measured beside the patched ones.
    """

    arch: str
    width: int
    height: int
    frames: int
    ring: int
    ulysses: int
    recipe: dict[str, Any] | None
    dtype: str
    device: str
    batch: int = 1
    layers: int | None = None
    repeats: int = 5
    backend: str = "auto"
    dense_backend: str = "native"
    compiled: bool = False
    dense: bool = True

    @property
    def processes(self) -> int:
        return self.ring * self.ulysses


def bench_shared(shared: Shared) -> dict[str, Any]:
    """Start the processes, wait for them, and return what they found, as plain data.

    Raises:
        ValueError: less than two processes, or more than there are GPUs.
        RuntimeError: a process failed; the end of what it said.
    """
    refuse(shared)
    with tempfile.TemporaryDirectory() as folder:
        settings, found = Path(folder) / "settings.json", Path(folder) / "found.json"
        settings.write_text(json.dumps(asdict(shared)), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(shared.processes), "-m", __spec__.name, str(settings), str(found)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
        if done.returncode or not found.exists():
            raise RuntimeError(f"{shared.processes} processes failed: {_why(done.stderr)}")
        data: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
        return data


def refuse(shared: Shared) -> None:
    """Raise where so many processes cannot share a forward here."""
    if shared.processes < 2:
        raise ValueError(f"--context-parallel needs at least 2 processes, got {shared.processes}.")
    if shared.device == "cuda" and torch.cuda.device_count() < shared.processes:
        raise ValueError(
            f"--context-parallel {shared.processes} needs as many GPUs, and this machine has "
            f"{torch.cuda.device_count()}."
        )


def _why(said: str) -> str:
    """The last error that a process printed, in one line."""
    errors = [line for line in said.splitlines() if "Error: " in line and "ChildFailedError" not in line]
    return errors[-1].split("]: ", 1)[-1] if errors else said.strip()[-400:]


def cp_plan(model: nn.Module) -> Any:
    """How diffusers splits a model's tokens: None for its own plan, or one for a model that diffusers has none for.

    Raises:
        ValueError: nobody has said how.
    """
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    if getattr(model, "_cp_plan", None) is not None:
        return None
    if type(model).__name__ == "HunyuanVideoTransformer3DModel":
        # Text behind its refiner, which attends to itself. A process makes its mask by the length of its own text, so
        # that no padding may be hidden.
        of_tokens = ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)
        of_rope = ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)
        return {
            "rope": {0: of_rope, 1: of_rope},
            "x_embedder": {0: of_tokens},
            "context_embedder": {0: of_tokens},
            "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
        }
    raise ValueError(f"diffusers has no plan to share {type(model).__name__} out; take Wan, FLUX or HunyuanVideo.")


def measure(shared: Shared) -> dict[str, Any]:
    """What one of the processes runs; the same data in each."""
    from diffusers import ContextParallelConfig

    rank, device, dtype = dist.get_rank(), _device(shared.device), getattr(torch, shared.dtype)
    known = architecture(shared.arch)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(restored_dense_backend())
        dense = known.build(dtype=dtype, device=device, layers=shared.layers)
        size = {"width": shared.width, "height": shared.height, "frames": shared.frames, "batch": shared.batch}
        inputs = known.make_inputs(dense, **size, dtype=dtype, device=device)
        if "encoder_attention_mask" in inputs:
            inputs = _without_padding(inputs)
        stack.enter_context(dense_attention(dense, shared.dense_backend))
        models = {"dense, one": dense} | {
            name: share_weights(dense) for name in ("patched, one", "dense, shared", "patched, shared")
        }
        plan = cp_plan(dense)
        for name in ("dense, shared", "patched, shared"):
            config = ContextParallelConfig(ring_degree=shared.ring, ulysses_degree=shared.ulysses)
            models[name].enable_parallelism(config=config, cp_plan=plan)  # type: ignore[operator]
        if shared.ring > 1 and shared.dense_backend == "native":
            del models["dense, shared"]  # which has no log-sum-exp for diffusers' own ring
        if not shared.dense:
            models = {name: model for name, model in models.items() if name.startswith("patched")}
        recipe = None if shared.recipe is None else Recipe.from_dict(shared.recipe)
        handles = {
            name: stack.enter_context(patch(model, recipe, backend=shared.backend))
            for name, model in models.items()
            if name.startswith("patched")
        }
        if shared.compiled:
            _compile(stack, list(models.values()))
        variants = {name: Variant(model, inputs) for name, model in models.items()}

        def together(name: str) -> Callable[[], None]:
            def run() -> None:
                dist.barrier()
                variants[name].run()

            return run

        runs = {name: together(name) for name in variants}
        for run in (*runs.values(), *runs.values()):
            run()
        for variant in variants.values():
            variant.seconds.clear()
        before = {name: handle.summary() for name, handle in handles.items()}
        for _ in in_turns(runs, shared.repeats):
            pass
        after = {name: handle.summary() for name, handle in handles.items()}
    attention = {
        name: {
            "attention_s": (after[name].sparse_seconds - before[name].sparse_seconds) / shared.repeats,
            "plan_s": (after[name].plan_seconds - before[name].plan_seconds) / shared.repeats,
        }
        for name in handles
    }
    alone, apart = (variants[name].output.double() for name in ("patched, one", "patched, shared"))
    own = {
        "rank": rank,
        "density": after["patched, shared"].density,
        "dense_calls": after["patched, shared"].dense_calls,
        "timings": {name: variant.timing().to_dict() for name, variant in variants.items()},
        "attention_per_forward": attention,
    }
    ranks: list[Any] = [None] * shared.processes
    dist.all_gather_object(ranks, own)
    return {
        "context_parallel": {"processes": shared.processes, "ring": shared.ring, "ulysses": shared.ulysses},
        "ranks": ranks,
        "imbalance": after["patched, shared"].imbalance,
        "speedup": _ratios(variants),
        "relative_difference": float((apart - alone).norm() / alone.norm()),
        "finite": bool(alone.isfinite().all() and apart.isfinite().all()),
        "summary": after["patched, shared"].to_dict(),
    }


def _without_padding(inputs: dict[str, Any]) -> dict[str, Any]:
    """The prompt's visible tokens alone, as if it were as long as that."""
    mask = inputs["encoder_attention_mask"]
    visible = int(mask[0].sum())
    return {
        **inputs,
        "encoder_hidden_states": inputs["encoder_hidden_states"][:, :visible],
        "encoder_attention_mask": mask[:, :visible],
    }


def _ratios(variants: dict[str, Variant]) -> dict[str, float]:
    """How many times as fast: patched on all against patched on one, and against dense on all."""
    fast = variants["patched, shared"].seconds
    return {
        f"over {name}": speed_up([variants[name].seconds], [fast]).median
        for name in variants
        if name != "patched, shared"
    }


def _compile(stack: ExitStack, models: list[nn.Module]) -> None:
    import torch._dynamo

    stack.enter_context(torch._dynamo.config.patch({"recompile_limit": 64, "accumulated_recompile_limit": 1024}))
    for model in models:
        for block in repeated_blocks(model):
            block.compile()


def _device(kind: str) -> torch.device:
    return torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)


def main(settings: str, found: str) -> None:
    """One process of those that torchrun started."""
    shared = Shared(**json.loads(Path(settings).read_text(encoding="utf-8")))
    if shared.device == "cuda":
        torch.cuda.set_device(_device("cuda"))
    else:
        # diffusers divides by it, and a CPU has none.
        torch.accelerator.device_count = lambda: shared.processes
    load_group_defaults()
    dist.init_process_group("nccl" if shared.device == "cuda" else "gloo")
    data = measure(shared)
    if dist.get_rank() == 0:
        Path(found).write_text(json.dumps(data), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
