"""Time one transformer forward, dense and patched, in turns."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..api import patch
from ..patches.families import family_of
from ..patches.seam import seam_symbol
from ..patches.summary import PatchSummary
from ..patches.targets import repeated_blocks
from ..pipelines.architectures import Architecture, first_output
from ..quality.bootstrap import Interval
from ..quality.turns import Timing, in_turns, speed_up
from ..recipe import Recipe

# diffusers' names. Each goes through torch, so that no package has to be fetched.
DENSE_BACKENDS = ("_native_cudnn", "_native_flash", "native")
# Above what sums in another order make in half precision through some dozens of layers.
REPEAT_TOLERANCE = 0.01


@dataclass(frozen=True, eq=False)
class ForwardReport:
    """What :func:`bench_forward` found.

    Attributes:
        dense, patched: times of the two variants.
        dense_backend: attention of the dense variant.
        dense_candidates: seconds of each candidate in a shallow model, or why it cannot run.
        relative_difference: of the patched output to the dense one, as a ratio of norms.
        repeat_difference: of the last patched output to the first one after patching: 0 where a plan that the
            schedule kept is the one that a fresh patch makes.
        finite: whether both outputs hold finite values only.
        sparse_seconds, dense_seconds, plan_seconds: per patched forward: sparse attention, attention calls
            that stayed dense, and planning.
        density, mean_density: of the sparse calls, and of all calls with dense ones counted as 1.
        summary: of the patch, warm-up included.
        warm_up_seconds: first calls of both variants, compilation included.
        notes: what a reader should know.
    """

    dense: Timing
    patched: Timing
    dense_backend: str
    dense_candidates: dict[str, float | str]
    relative_difference: float
    repeat_difference: float
    finite: bool
    sparse_seconds: float
    dense_seconds: float
    plan_seconds: float
    summary: PatchSummary
    warm_up_seconds: float
    notes: tuple[str, ...] = field(default=())

    @property
    def speedup(self) -> Interval:
        """Its median is the ratio of the medians; the ends are as far as the noise of the runs goes."""
        return speed_up([self.dense.seconds], [self.patched.seconds])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "speedup": self.speedup.median,
            "speedup_range": [self.speedup.low, self.speedup.high],
            "dense": self.dense.to_dict(),
            "patched": self.patched.to_dict(),
            "dense_backend": self.dense_backend,
            "dense_candidates": self.dense_candidates,
            "relative_difference": self.relative_difference,
            "repeat_difference": self.repeat_difference,
            "finite": self.finite,
            "attention_per_forward": {
                "sparse_s": self.sparse_seconds,
                "dense_s": self.dense_seconds,
                "plan_s": self.plan_seconds,
                "plan_share_of_forward": self.plan_seconds / self.patched.median,
            },
            "density": self.summary.density,
            "mean_density": self.summary.mean_density,
            "warm_up_s": self.warm_up_seconds,
            "notes": list(self.notes),
            "summary": self.summary.to_dict(),
        }


def bench_forward(
    architecture: Architecture,
    *,
    width: int,
    height: int,
    frames: int,
    recipe: Recipe | None,
    dtype: torch.dtype,
    device: torch.device,
    batch: int = 1,
    layers: int | None = None,
    repeats: int = 5,
    backend: str = "auto",
    dense_backend: str | None = None,
    compiler: str | None = None,
    progress: Callable[[str], None] = lambda _stage: None,
) -> ForwardReport:
    """Build a transformer with random weights and time its forward, dense and patched, in turns.

    Both variants share one set of weights. After two untimed forwards of each they take turns, and which goes first
    changes from one turn to the next, so that a machine that slows down slows both. The patch stays over all turns:
    patching anew would discard compiled code. The inputs are the same in every forward, so a kept plan is the one that
    a fresh patch would make; ``repeat_difference`` of the report shows it.

    Args:
        width, height, frames: pixel size of the clip.
        recipe: of the patched variant; None for the automatic one.
        layers: blocks to keep, None for all.
        repeats: measured forwards of each variant.
        backend: of the sparse attention.
        dense_backend: of the dense variant; None tries each of :data:`DENSE_BACKENDS` on a shallow model and
            takes the fastest.
        compiler: backend of ``torch.compile`` for the repeated blocks of both variants, None for eager.
        progress: told what is going on.

    Raises:
        ValueError: an impossible size, batch or number of layers or repeats, an unknown backend, or a dense one that
            cannot run here.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")
    size = {"width": width, "height": height, "frames": frames, "batch": batch}
    architecture.latent_size(width, height, frames)
    if dense_backend is not None:
        refuse_dense_backend(dense_backend, architecture.config.get("attention_head_dim", 64), dtype, device)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(restored_dense_backend())
        candidates: dict[str, float | str] = {}
        if dense_backend is None:
            progress("choosing the dense backend")
            dense_backend, candidates = fastest_dense_backend(architecture, size, dtype, device)
        progress("building the model")
        model = architecture.build(dtype=dtype, device=device, layers=layers)
        inputs = architecture.make_inputs(model, **size, dtype=dtype, device=device)
        stack.enter_context(dense_attention(model, dense_backend))
        twin = share_weights(model)
        handle = stack.enter_context(patch(twin, recipe, backend=backend))
        if compiler is not None:
            stack.enter_context(compiled_blocks(model, twin, compiler))
        variants = {"dense": Variant(model, inputs), "patched": Variant(twin, inputs)}
        progress("warming up" + (" and compiling" if compiler else ""))
        start = time.perf_counter()
        with dense_backend_errors(dense_backend, dtype, device):
            variants["dense"].run()
        variants["patched"].run()
        first_patched = variants["patched"].output.float()
        for variant in variants.values():
            variant.run()
        warm_up = time.perf_counter() - start
        for variant in variants.values():
            variant.seconds.clear()
        before = handle.summary()
        for number, _ in enumerate(in_turns({name: v.run for name, v in variants.items()}, repeats)):
            progress(f"measured {number // 2} of {repeats}")
        after = handle.summary()
        dense_out, patched_out = (variant.output.float() for variant in variants.values())
        difference = float((patched_out - dense_out).norm() / dense_out.norm())
        repeat_difference = float((patched_out - first_patched).norm() / first_patched.norm())
        finite = bool(dense_out.isfinite().all() and patched_out.isfinite().all())
    return ForwardReport(
        dense=variants["dense"].timing(),
        patched=variants["patched"].timing(),
        dense_backend=dense_backend,
        dense_candidates=candidates,
        relative_difference=difference,
        repeat_difference=repeat_difference,
        finite=finite,
        sparse_seconds=(after.sparse_seconds - before.sparse_seconds) / repeats,
        dense_seconds=(after.dense_seconds - before.dense_seconds) / repeats,
        plan_seconds=(after.plan_seconds - before.plan_seconds) / repeats,
        summary=after,
        warm_up_seconds=warm_up,
        notes=tuple(_notes(handle.recipe, after, repeat_difference)),
    )


class Variant:
    """One model and what its forwards took."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        self.model = model
        self.inputs = inputs
        self.device = next(model.parameters()).device
        self.seconds: list[float] = []
        self.peak: int | None = None
        self.output = torch.empty(0)

    def run(self) -> None:
        """One forward; its time and output are kept."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            output = first_output(self.model(**self.inputs))
            self.seconds.append(time.perf_counter() - start)
        else:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            begin.record()
            output = first_output(self.model(**self.inputs))
            end.record()
            torch.cuda.synchronize(self.device)
            self.seconds.append(begin.elapsed_time(end) / 1000)
            self.peak = torch.cuda.max_memory_allocated(self.device)
        self.output = output

    def timing(self) -> Timing:
        return Timing(tuple(self.seconds), self.peak)


def _notes(recipe: Recipe, summary: PatchSummary, repeat_difference: float) -> Iterator[str]:
    if recipe.schedule.dense_fraction > 0:
        yield (
            "schedule.dense_fraction does not act on a bare transformer, which has no steps: this is the "
            "time of a sparse step."
        )
    if recipe.schedule.keeps_plans:
        yield "The schedule keeps plans: a forward here reuses them as the steps of a run would."
    if not summary.sparse_calls:
        yield "No attention call ran sparse."
    if repeat_difference > REPEAT_TOLERANCE:
        yield (
            f"The last patched forward differs from the first by {repeat_difference:.2g}, on the same inputs: what was "
            "timed is not what a fresh patch computes."
        )


def share_weights(model: nn.Module) -> nn.Module:
    """A second model over the same parameters and buffers."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _attends_through_dispatch(model: nn.Module) -> bool:
    family = family_of(model)
    assert family is not None
    processors = [
        module.processor
        for path, module in model.named_modules()
        if family.has_self_attention(path) and hasattr(module, "processor")
    ]
    return seam_symbol(processors[0])[1] == "dispatch_attention_fn"


def refuse_dense_backend(name: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Check a dense backend before a model is built for it.

    Raises:
        ValueError: diffusers knows no such backend, or it is one of torch's that cannot run here. Other projects'
            kernels are fetched when a model asks for them, and fail then.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    known = [backend.value for backend in AttentionBackendName]
    if name not in known:
        raise ValueError(f"Unknown dense backend {name!r}; diffusers knows {', '.join(known)}.")
    if name.lstrip("_").startswith("native"):
        x = torch.zeros(1, 128, 1, head_dim, dtype=dtype, device=device)
        with dense_backend_errors(name, dtype, device):
            dispatch_attention_fn(x, x, x, backend=AttentionBackendName(name))


@contextmanager
def dense_backend_errors(name: str, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Turn what a dense backend raises where it cannot run into a sentence that names it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0].rstrip(".")
        where = f"in {str(dtype).removeprefix('torch.')} on {device.type}"
        raise ValueError(
            f"The dense backend {name!r} cannot run {where} ({reason}); leave it out for the fastest that runs."
        ) from error


@contextmanager
def restored_dense_backend() -> Iterator[None]:
    """``set_attention_backend`` also sets a process-wide default; put it back."""
    from diffusers.models.attention_dispatch import attention_backend

    with attention_backend("native"):
        yield


@contextmanager
def dense_attention(model: Any, name: str) -> Iterator[None]:
    """Give a model's dense attention a backend, by diffusers' name, whichever way the model attends."""
    if _attends_through_dispatch(model):
        model.set_attention_backend(name)
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels: dict[str, Callable[[], Any]] = {
        "native": nullcontext,
        "_native_cudnn": lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
        "_native_flash": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    }
    if name not in kernels:
        raise ValueError(
            f"{type(model).__name__} attends through torch: its dense backend must be one of "
            f"{', '.join(kernels)}, got {name!r}."
        )
    with kernels[name]():
        yield


def fastest_dense_backend(
    architecture: Architecture, size: dict[str, int], dtype: torch.dtype, device: torch.device
) -> tuple[str, dict[str, float | str]]:
    """The dense backend with the fastest forward of a model of one block of each kind, and what each took."""
    if device.type != "cuda":
        return "native", {}
    model = architecture.build(dtype=dtype, device=device, layers=len(architecture.depth))
    variant = Variant(model, architecture.make_inputs(model, **size, dtype=dtype, device=device))
    found: dict[str, float | str] = {}
    times: dict[str, float] = {}
    for name in DENSE_BACKENDS:
        variant.seconds.clear()
        try:
            with dense_attention(model, name):
                for _ in range(4):
                    variant.run()
        except (RuntimeError, ValueError) as error:
            # cuDNN and flash refuse masks, head dims or dtypes; torch says so in many lines.
            found[name] = f"cannot run: {str(error).strip().splitlines()[0]}"
        else:
            found[name] = times[name] = min(variant.seconds[1:])
    if not times:
        raise RuntimeError(f"No dense attention backend runs here: {found}.")
    return min(times, key=lambda name: times[name]), found


@contextmanager
def compiled_blocks(model: nn.Module, twin: nn.Module, compiler: str) -> Iterator[None]:
    """Compile the repeated blocks of both models."""
    import torch._dynamo

    # Two models need twice the compiled variants of one.
    limits = {"recompile_limit": 64, "accumulated_recompile_limit": 1024}
    with torch._dynamo.config.patch(limits):
        for block in itertools.chain(repeated_blocks(model), repeated_blocks(twin)):
            block.compile(fullgraph=True, backend=compiler)
        yield
