"""Which run a forward belongs to, and at which step and guidance branch of it, read from whatever runs it.

A run is one pass of a pipeline over one schedule of timesteps, in one thread. Schedulers make a new tensor of
timesteps for each run, so that tensor is what a run is known by; an index that falls tells the rest.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..layout import StepContext
from ..run import Run


@dataclass(eq=False)
class _Trajectory:
    """A run under way: its schedule, and how far it is."""

    schedule: weakref.ref[torch.Tensor]
    scheduler: weakref.ref[Any]
    sigmas: tuple[float, ...]
    run: Run = field(default_factory=Run)
    index: int | None = None
    # What tells the timestep that the transformer was given, read only while the scheduler shows no progress.
    timestep: tuple[float, float] | None = None
    stalled: bool = False
    forwards: Counter[str] = field(default_factory=Counter)

    def at(self, index: int | None, timestep: tuple[float, float] | None) -> None:
        """Go on to a step. Forwards within a step are counted, by the branch's name."""
        moved = index != self.index or (timestep is not None and timestep != self.timestep)
        self.index, self.timestep = index, timestep
        if moved:
            self.forwards.clear()

    def branch(self, name: str | None) -> str:
        """The guidance branch of the step's next forward: its name, or its ordinal within the step."""
        ordinal = self.forwards[name or ""]
        self.forwards[name or ""] += 1
        if name is None:
            return f"#{ordinal}"
        return name if ordinal == 0 else f"{name}#{ordinal}"


class PipelineSchedules:
    """The schedules that pipelines have run, in any thread: a later forward outside their call is none of theirs."""

    def __init__(self) -> None:
        self._refs: dict[int, weakref.ref[torch.Tensor]] = {}

    def add(self, schedule: torch.Tensor) -> None:
        key = id(schedule)
        if key not in self._refs:
            self._refs[key] = weakref.ref(schedule, lambda _: self._refs.pop(key, None))

    def add_begun(self, pipe: Any) -> None:
        """The schedule of a pipeline that is patched, if it has moved: what ran it, or broke off, came before."""
        scheduler = getattr(pipe, "scheduler", None)
        schedule = getattr(scheduler, "timesteps", None)
        if isinstance(schedule, torch.Tensor) and getattr(scheduler, "step_index", None) is not None:
            self.add(schedule)

    def __contains__(self, schedule: torch.Tensor) -> bool:
        return id(schedule) in self._refs


class RunTracker:
    """Follows the runs of one transformer in one thread.

    Args:
        model: the transformer.
        patched: the pipeline that was patched, for denoising loops written by hand; None for a bare transformer.
        pipeline_schedules: shared by all threads and transformers of a patch.
    """

    def __init__(
        self,
        model: weakref.ref[nn.Module],
        patched: weakref.ref[Any] | None,
        pipeline_schedules: PipelineSchedules,
    ) -> None:
        self._model = model
        self._patched = patched
        self._pipeline_schedules = pipeline_schedules
        # One pipeline may call another between two steps (a callback), so more than one run may be under way.
        self._trajectories: list[_Trajectory] = []
        self._bare = Run()
        self._was_bare = False

    def next_forward(
        self, forward_id: int, name: str | None, timestep: torch.Tensor | None
    ) -> tuple[Run, StepContext, str | None]:
        """Run and step of a forward that begins, and why its step is unknown if a pipeline runs it.

        Args:
            forward_id: number of the forward.
            name: guidance branch as the pipeline names it.
            timestep: what the transformer is given, read only where nothing else shows progress.
        """
        model = self._model()
        pipe = None if model is None else running_pipeline(model)
        scheduler = getattr(self._handmade(timestep) if pipe is None else pipe, "scheduler", None)
        schedule = getattr(scheduler, "timesteps", None)
        if not isinstance(schedule, torch.Tensor) or not getattr(scheduler, "num_inference_steps", None):
            return self._bare_forward(forward_id, name, "the pipeline shows no schedule" if pipe is not None else None)
        if pipe is not None:
            self._pipeline_schedules.add(schedule)
        found = self._trajectory(scheduler, schedule)
        index, value = _step(pipe, scheduler, schedule), None
        if index is None:
            # Nothing has moved yet, or nothing ever will: the timestep tells which.
            value = _value_and_mean(timestep)
            found.stalled |= found.timestep is not None and value != found.timestep
            if hasattr(scheduler, "step_index") and not found.stalled:
                index = _first_index(scheduler, schedule, timestep)
                if index is None:
                    index = getattr(scheduler, "begin_index", None) or 0
        if index is not None and found.index is not None and index < found.index:
            self._trajectories.remove(found)
            found = self._trajectory(scheduler, schedule)
        found.at(index, value)
        self._was_bare = False
        branch = found.branch(name)
        if index is None:
            return found.run, StepContext(branch=branch, forward_id=forward_id), "its scheduler shows no progress"
        sigma = found.sigmas[index] if index < len(found.sigmas) else None
        step = StepContext(index, len(schedule), sigma, branch, forward_id, guided=is_guided(pipe), sigmas=found.sigmas)
        return found.run, step, None

    def _bare_forward(self, forward_id: int, name: str | None, why: str | None) -> tuple[Run, StepContext, str | None]:
        """A forward outside any run; successive ones share what they keep."""
        if not self._was_bare:
            self._bare, self._was_bare = Run(), True
        return self._bare, StepContext(branch=name, forward_id=forward_id), why

    def _handmade(self, timestep: torch.Tensor | None) -> Any:
        """The patched pipeline, if somebody steps through its scheduler outside its call; else None.

        A schedule that a pipeline ran before is over, finished or not. Of one that has not moved yet the transformer
        must be given a timestep: a pipeline may have failed between setting it and its first forward.
        """
        pipe = None if self._patched is None else self._patched()
        scheduler: Any = getattr(pipe, "scheduler", None)
        schedule = getattr(scheduler, "timesteps", None)
        if not isinstance(schedule, torch.Tensor) or not hasattr(scheduler, "step_index"):
            return None
        if schedule in self._pipeline_schedules:
            return None
        if scheduler.step_index is None:
            known = timestep is None or _first_index(scheduler, schedule, timestep) is not None
            return pipe if known else None
        return pipe if scheduler.step_index < len(schedule) else None

    def _trajectory(self, scheduler: Any, schedule: torch.Tensor) -> _Trajectory:
        self._trajectories = [one for one in self._trajectories if one.schedule() is not None]
        for one in self._trajectories:
            if one.schedule() is schedule and one.scheduler() is scheduler:
                return one
        found = _Trajectory(weakref.ref(schedule), weakref.ref(scheduler), tuple(sigmas_of(scheduler)))
        self._trajectories.append(found)
        return found


def is_guided(pipe: Any | None) -> bool:
    """Whether a pipeline that runs says that it has classifier-free guidance."""
    # A property of most pipelines, which compares what their call was given: nothing, or a scale for each image.
    try:
        return bool(getattr(pipe, "do_classifier_free_guidance", False))
    except (TypeError, ValueError, RuntimeError):
        return False


def running_pipeline(model: nn.Module) -> Any | None:
    """The innermost pipeline that is calling ``model`` in this thread; None outside any.

    Pipelines announce themselves nowhere, and several may share a transformer, each with a scheduler of its own:
    only the stack tells whose call it is. Frames of ``__call__`` are looked at, since that is where diffusers'
    pipelines, and the blocks of its modular ones, hold their denoising loops.
    """
    for frame_locals in _calls_below():
        for name in ("self", "components"):
            owner = frame_locals.get(name)
            held = getattr(owner, "__dict__", {})
            if "scheduler" in held and any(_is_or_holds(part, model) for part in held.values()):
                return owner
    return None


def _is_or_holds(part: Any, model: nn.Module) -> bool:
    """Whether a component is the model, compiled or not, or several control networks with it among them."""
    part = getattr(part, "_orig_mod", part)
    if part is model:
        return True
    several = getattr(part, "nets", None)
    return isinstance(several, nn.ModuleList) and any(getattr(one, "_orig_mod", one) is model for one in several)


def _calls_below() -> Iterator[dict[str, Any]]:
    """Local variables of the ``__call__`` methods on this thread's stack, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__call__" and code.co_argcount and code.co_varnames[0] == "self":
            yield frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]


def sigmas_of(scheduler: Any) -> list[float]:
    """Noise level of every step of a run, falling; empty for a scheduler that has none.

    Schedulers without sigmas but with the cumulative product of their alphas (DDIM and its kin) have
    ``sqrt((1 - alpha) / alpha)``, which is what diffusers' other schedulers make of the same betas; with a
    terminal signal of zero it is cut at 10,000.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if isinstance(sigmas, torch.Tensor):
        return [float(sigma) for sigma in sigmas.tolist()]
    alphas, timesteps = getattr(scheduler, "alphas_cumprod", None), scheduler.timesteps
    if not isinstance(alphas, torch.Tensor) or timesteps.is_floating_point():
        return []
    signal = alphas.cpu().double()[timesteps.cpu()].clamp_min(1e-8)
    return [float(sigma) for sigma in ((1 - signal) / signal).sqrt().tolist()]


def _step(pipe: Any, scheduler: Any, schedule: torch.Tensor) -> int | None:
    """The step that pipeline or scheduler show; None before the scheduler's first step, or where neither shows it."""
    # The pipeline's timestep is mostly a view into the schedule: its place there is exact and costs no wait.
    current = getattr(pipe, "_current_timestep", None)
    if isinstance(current, torch.Tensor):
        if current.untyped_storage().data_ptr() == schedule.untyped_storage().data_ptr():
            return int(current.storage_offset() - schedule.storage_offset())
        if not hasattr(scheduler, "step_index"):
            matches = (schedule == current.to(schedule.device)).nonzero()
            return int(matches[0]) if len(matches) else None
    index: int | None = getattr(scheduler, "step_index", None)
    return index


def _value(timestep: torch.Tensor | None) -> float | None:
    """Largest entry of a timestep, since tokens of given frames have none of their own; waits for the device."""
    if not isinstance(timestep, torch.Tensor) or not timestep.numel():
        return None
    return float(timestep.detach().max())


def _value_and_mean(timestep: torch.Tensor | None) -> tuple[float, float] | None:
    """What differs between two steps: frames may be denoised one after the other, and the largest entry then stays."""
    value = _value(timestep)
    return None if value is None or timestep is None else (value, float(timestep.detach().double().mean()))


def _first_index(scheduler: Any, schedule: torch.Tensor, timestep: torch.Tensor | None) -> int | None:
    """Where a run of a schedule begins: what the scheduler was told, or the place of the timestep that the transformer
    is given, as it is or as a share of 1000, in whatever numbers; None where it has no place."""
    begin: int | None = getattr(scheduler, "begin_index", None)
    value = _value(timestep)
    if value is None or timestep is None:
        return begin
    precision = torch.finfo(timestep.dtype).eps if timestep.is_floating_point() else 0.0
    places = schedule.double().cpu() if begin is None else schedule[begin : begin + 1].double().cpu()
    for unit in (1, 1000):
        distance = (places - value * unit).abs()
        if len(places) and bool(distance.min() <= 2 * precision * abs(value * unit)):
            return int(distance.argmin()) + (begin or 0)
    return None


def step_index(pipe: Any, scheduler: Any, timesteps: torch.Tensor) -> int:
    """The denoising step that a pipeline is in; the first where it shows none."""
    index = _step(pipe, scheduler, timesteps)
    return (getattr(scheduler, "begin_index", None) or 0) if index is None else index
