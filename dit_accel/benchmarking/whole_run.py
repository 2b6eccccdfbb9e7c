"""Time a whole run with random weights, dense and accelerated: text, all steps, decoding."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..acceleration.api import change_beside_attention
from ..acceleration.compiled import compile_blocks
from ..acceleration.decoding import read_settings
from ..acceleration.linears import refuse_format
from ..api import patch
from ..patches.summary import PatchSummary
from ..pipelines.architectures import Architecture
from ..pipelines.pixels import make_pixels
from ..pipelines.whole import TextEncoder, WholePipeline, whole_pipeline
from ..quality.bootstrap import Interval
from ..quality.turns import LONG_WARM_UP_STEPS, measured_in_turns, speed_up
from ..recipe import Recipe
from .block_clock import timed_blocks
from .forward import dense_attention, fastest_dense_backend, restored_dense_backend, share_weights

TEXT_REPEATS = 3


@dataclass(frozen=True)
class RunTimes:
    """Seconds of one run's stages.

    Attributes:
        text: encoding of the prompts.
        steps: of each denoising step that ran.
        blocks: of all these steps together, within the transformer's blocks.
        decode: from the last step to the frames on the host.
    """

    text: float
    steps: tuple[float, ...]
    blocks: float
    decode: float

    def of_all(self, num_steps: int, depth: float) -> RunTimes:
        """The stages of the whole run of the whole model.

        Args:
            num_steps: of the run, of which some may have been measured.
            depth: blocks of the whole model as a multiple of those measured.
        """
        more = self.blocks * (depth - 1.0) / len(self.steps)
        steps = tuple(step + more for step in self.steps)
        if len(steps) < num_steps:
            steps = (statistics.fmean(steps),) * num_steps
        return RunTimes(self.text, steps, self.blocks * depth * num_steps / len(self.steps), self.decode)

    @property
    def total(self) -> float:
        return self.text + sum(self.steps) + self.decode

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True, eq=False)
class RunReport:
    """What :func:`bench_run` found.

    Attributes:
        dense, fast: of each run, the stages as measured.
        num_steps: of a whole run.
        depth: blocks of the whole model as a multiple of those measured.
        dense_backend: attention of the dense side.
        summary: of the patch, of all runs.
        finite: whether both outputs hold finite values only.
        notes: what a reader should know.
    """

    dense: tuple[RunTimes, ...]
    fast: tuple[RunTimes, ...]
    num_steps: int
    depth: float
    dense_backend: str
    summary: PatchSummary
    finite: bool
    notes: tuple[str, ...]

    def whole(self, side: Sequence[RunTimes]) -> list[RunTimes]:
        """The runs of a side, of the whole model and all steps."""
        return [times.of_all(self.num_steps, self.depth) for times in side]

    @property
    def speedup(self) -> Interval:
        """Of whole runs."""
        seconds = [[times.total for times in self.whole(side)] for side in (self.dense, self.fast)]
        return speed_up([seconds[0]], [seconds[1]])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "speedup": self.speedup.median,
            "speedup_range": [self.speedup.low, self.speedup.high],
            "num_steps": self.num_steps,
            "depth": self.depth,
            "dense_backend": self.dense_backend,
            **{
                side: {
                    "measured": [times.to_dict() for times in runs],
                    "whole": [times.to_dict() for times in self.whole(runs)],
                }
                for side, runs in (("dense", self.dense), ("fast", self.fast))
            },
            "finite": self.finite,
            "notes": list(self.notes),
            "summary": self.summary.to_dict(),
        }


def bench_run(
    architecture: Architecture,
    *,
    width: int,
    height: int,
    frames: int,
    recipe: Recipe | None,
    dtype: torch.dtype,
    device: torch.device,
    num_steps: int = 30,
    layers: int | None = None,
    dense_steps: int | None = None,
    repeats: int = 1,
    backend: str = "auto",
    dense_backend: str | None = None,
    compiler: str | None = None,
    graphs: bool = False,
    linear: str | None = None,
    vae: str | None = None,
    progress: Callable[[str], None] = lambda _stage: None,
) -> RunReport:
    """Build a pipeline with random weights and time its whole run, dense and accelerated, in turns.

    Each side is warmed up by a short run. A dense step takes as long as any other, so that a dense run may be
    measured by few; so do blocks, and a shallow model stands for the whole one.

    Args:
        width, height, frames: pixel size of the clip.
        recipe: of the accelerated side; None for the automatic one. With random weights only a reuse that is known
            before the run (``listed``, ``forecast``) skips as many steps as with trained ones.
        num_steps: of a run.
        layers: blocks to keep, None for all.
        dense_steps: measured steps of the dense side, None for all.
        repeats: measured runs of each side.
        backend: of the sparse attention.
        dense_backend: as in :func:`~dit_accel.benchmarking.forward.bench_forward`.
        compiler: backend of ``torch.compile`` for the blocks of both sides, None for eager.
        graphs, linear, vae: of the accelerated side, as :func:`dit_accel.accelerate` takes them.
        progress: told what is going on.

    Raises:
        ValueError: an architecture whose pipeline is not known, an impossible size, number of layers, steps or
            repeats, or a setting that cannot run here.
    """
    for name, count in (("num_steps", num_steps), ("repeats", repeats), ("dense_steps", dense_steps)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}.")
    if vae is not None:
        read_settings(vae)
    if linear is not None:
        refuse_format(linear, device)
    whole = whole_pipeline(architecture)
    architecture.latent_size(width, height, frames)
    size = {"width": width, "height": height, "frames": frames, "batch": 1}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(restored_dense_backend())
        if dense_backend is None:
            progress("choosing the dense backend")
            dense_backend, _ = fastest_dense_backend(architecture, size, dtype, device)
        progress("timing the text encoders")
        text = sum(whole.prompts * _text_seconds(encoder, dtype, device) for encoder in whole.encoders)
        progress("building the model")
        model = architecture.build(dtype=dtype, device=device, layers=layers)
        autoencoder = whole.build_autoencoder(device)
        stack.enter_context(dense_attention(model, dense_backend))
        # Rounded weights cannot be shared.
        twin = share_weights(model) if linear is None else copy.deepcopy(model)
        dense = whole.build(model, autoencoder)
        fast = whole.build(twin, copy.deepcopy(autoencoder) if vae else autoencoder)
        handle = stack.enter_context(patch(fast, recipe, backend=backend))
        change_beside_attention(handle, linear=linear, vae=vae)
        if compiler is not None:
            stack.enter_context(_room_for_two())
            for pipe in (dense, fast):
                stack.callback(compile_blocks(pipe, backend=compiler))
        change_beside_attention(handle, graphs=graphs)
        call = {"width": width, "height": height, "num_frames": frames, **whole.embeddings(dtype, device)}
        sides = {
            "dense": _Side(dense, model, call, text, dense_steps or num_steps),
            "fast": _Side(fast, twin, call, text, num_steps),
        }
        progress("warming up" + (" and compiling" if compiler else ""))
        found = measured_in_turns({name: side.run for name, side in sides.items()}, repeats, warm_up=True)
        summary = handle.summary()
    blocks = layers or architecture.blocks
    return RunReport(
        dense=tuple(found["dense"]),
        fast=tuple(found["fast"]),
        num_steps=num_steps,
        depth=architecture.blocks / blocks,
        dense_backend=dense_backend,
        summary=summary,
        finite=all(side.finite for side in sides.values()),
        notes=tuple(_notes(whole, blocks, architecture.blocks, dense_steps, num_steps)),
    )


class _Side:
    """A pipeline whose runs are timed."""

    def __init__(self, pipe: Any, model: nn.Module, call: dict[str, Any], text: float, num_steps: int) -> None:
        self.finite = True
        self._pipe = pipe
        self._model = model
        self._call = call
        self._text = text
        self._num_steps = num_steps

    def run(self, short: bool) -> RunTimes:
        """A whole call of the pipeline."""
        device = next(self._model.parameters()).device
        marks: list[float] = []

        def mark(_pipe: Any, _index: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
            marks.append(_now(device))
            return {}

        with timed_blocks(self._model) as blocks:
            begin = _now(device)
            steps = min(LONG_WARM_UP_STEPS, self._num_steps) if short else self._num_steps
            made = make_pixels(
                self._pipe,
                {
                    **self._call,
                    "num_inference_steps": steps,
                    "generator": torch.Generator("cpu").manual_seed(0),
                    "callback_on_step_end": mark,
                },
            )
            end = _now(device)
            in_blocks = blocks.seconds()
        self.finite = self.finite and made.nan_values == 0
        seconds = tuple(after - before for before, after in zip([begin, *marks], marks, strict=False))
        return RunTimes(self._text, seconds, in_blocks, end - marks[-1])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _text_seconds(encoder: TextEncoder, dtype: torch.dtype, device: torch.device) -> float:
    """Of one prompt: the median after a first, untimed one."""
    model, ids = encoder.build(dtype, device), encoder.ids(device)
    seconds = []
    for _ in range(1 + TEXT_REPEATS):
        begin = _now(device)
        model(input_ids=ids)
        seconds.append(_now(device) - begin)
    return statistics.median(seconds[1:])


def _room_for_two() -> Any:
    """Two models need twice the compiled variants of one."""
    import torch._dynamo

    return torch._dynamo.config.patch({"recompile_limit": 64, "accumulated_recompile_limit": 1024})


def _notes(whole: WholePipeline, blocks: int, all_blocks: int, dense_steps: int | None, num_steps: int) -> list[str]:
    notes = []
    if blocks < all_blocks:
        notes.append(f"{blocks} of {all_blocks} blocks were measured; the time within blocks counts by their number.")
    if dense_steps is not None and dense_steps < num_steps:
        notes.append(f"{dense_steps} dense steps were measured; {num_steps} count by their mean.")
    if whole.tiled:
        notes.append("Both sides decode in tiles, as users do at this size.")
    return notes
