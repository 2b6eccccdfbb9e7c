"""One run of a pipeline: its clip, and where its time went."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..api import patch
from ..calibration.runs import begin
from ..patches.progress import sigmas_of
from ..pipelines.pixels import make_pixels
from ..quality.generation import checked_clip
from ..quality.metrics import METRICS, measure
from ..quality.stages import at_first_forward
from ..quality.video import ClipPair
from ..recipe import Recipe
from .lists import Trajectory, sampled
from .time_model import RunSeconds

TAKEN = ("callback_on_step_end", "callback_on_step_end_tensor_inputs", "output_type", "return_dict")
"""Arguments of the call that are tune's own."""


@dataclass(frozen=True, eq=False)
class Clip:
    """What one run made.

    Attributes:
        frames: uint8 ``[F, H, W, 3]``.
        finite: whether all pixels were; those that were not are black.
        seconds: of its parts.
        trajectory: what its steps gave.
        notes: of the patch's summary.
    """

    frames: torch.Tensor
    finite: bool
    seconds: RunSeconds
    trajectory: Trajectory
    notes: tuple[str, ...] = ()


def refuse_pipeline(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse a pipeline whose steps cannot be timed, and arguments that are tune's own.

    Raises:
        ValueError: says why.
    """
    if "callback_on_step_end" not in inspect.signature(type(pipe).__call__).parameters:
        raise ValueError(f"{type(pipe).__name__} takes no callback_on_step_end, by which tune times its steps.")
    taken = [name for name in TAKEN if name in arguments]
    if taken:
        raise ValueError(f"tune sets {taken[0]} itself, got {arguments[taken[0]]!r}.")


def make_clip(
    pipe: Any,
    recipe: Recipe | None,
    arguments: Mapping[str, Any],
    seed: int,
    short: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda _step, _steps: None,
) -> Clip:
    """Run a pipeline once, patched for this run alone.

    Args:
        recipe: None for the pipeline as it is.
        arguments: of its call.
        seed: of a generator on the CPU, where the arguments have none.
        short: arguments of an untimed call before it, under the same patch; None for none.
        progress: called after every step with its number, from 0, and their number.

    Raises:
        ValueError: the run begins in the middle of its schedule, so that no list of steps means the same.
    """
    marks: list[float] = []
    latents: list[torch.Tensor] = []
    first: list[float] = []

    def after(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        marks.append(now(pipe))
        if isinstance(tensors.get("latents"), torch.Tensor):
            latents.append(sampled(tensors["latents"]))
        progress(step, pipe.num_timesteps)
        return tensors

    call = {**begin(arguments, seed), "callback_on_step_end": after}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        handle = None if recipe is None else stack.enter_context(patch(pipe, recipe))
        if short is not None:
            pipe(**{**begin(short, seed), "output_type": "latent"})
        stack.enter_context(at_first_forward(pipe, lambda: first.append(now(pipe))))
        noise = stack.enter_context(_first_sample(pipe.scheduler))
        start = now(pipe)
        made = make_pixels(pipe, call)
        end = now(pipe)
        notes = () if handle is None else handle.summary().notes
    schedule = getattr(pipe.scheduler, "timesteps", ())
    if not marks or len(marks) != len(schedule):
        raise ValueError(
            f"tune needs runs of all steps of the schedule, and this one ran {len(marks)} of {len(schedule)}."
        )
    steps = tuple(after - before for before, after in zip([first[0], *marks], marks, strict=False))
    seconds = RunSeconds(steps, first[0] - start + end - marks[-1])
    return Clip(
        checked_clip(made),
        made.nan_values == 0,
        seconds,
        _trajectory(noise, latents, pipe.scheduler, len(steps)),
        notes,
    )


def measured(dense: torch.Tensor, clip: Clip, metrics: tuple[str, ...]) -> dict[str, float]:
    """Metrics of a clip to the dense one.

    Raises:
        ValueError: a metric cannot be computed, or the clip holds NaN.
    """
    if not clip.finite:
        raise ValueError("a run gave NaN or infinite pixels.")
    found = measure(ClipPair(dense, clip.frames), [METRICS[name] for name in metrics])
    for name, one in found.items():
        if one.value is None:
            raise ValueError(f"{METRICS[name].label} cannot be measured: {one.reason}")
    return {name: float(one.value) for name, one in found.items() if one.value is not None}


def _trajectory(noise: list[torch.Tensor], latents: list[torch.Tensor], scheduler: Any, num_steps: int) -> Trajectory:
    """Of what a run showed of its latents, if it did."""
    if len(latents) != num_steps or num_steps < 2 or len({one.shape for one in latents}) > 1:
        return Trajectory.usual(num_steps)
    before = [one for one in noise if one.shape == latents[0].shape]
    return Trajectory.of_latents([*before, *latents], sigmas_of(scheduler), num_steps)


def now(pipe: Any) -> float:
    """Seconds of a clock, the device idle."""
    if torch.device(pipe.device).type == "cuda" or torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def _first_sample(scheduler: Any) -> Iterator[list[torch.Tensor]]:
    """What the first step of a run begins with, which no callback of a pipeline tells."""
    seen: list[torch.Tensor] = []
    step = scheduler.step

    @functools.wraps(step)
    def look(*args: Any, **kwargs: Any) -> Any:
        sample = kwargs.get("sample", args[2] if len(args) > 2 else None)
        if not seen and isinstance(sample, torch.Tensor):
            seen.append(sampled(sample))
        return step(*args, **kwargs)

    scheduler.step = look
    try:
        yield seen
    finally:
        del scheduler.step
