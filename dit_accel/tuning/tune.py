"""The fastest recipe that meets a target on a user's prompts."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import presets
from ..api import patch
from ..calibration.identity import describe, describe_pipeline
from ..calibration.progress import Progress
from ..calibration.runs import run_arguments
from ..files import refuse_unwritable_folder, write_text
from ..patches.said_once import said_once
from ..quality.generation import compiles, shortened
from ..quality.lpips import find_weights
from ..quality.measurement import MetricUnavailable
from ..quality.turns import LONG_WARM_UP_STEPS
from ..recipe import Recipe
from .candidates import MOST_PARTS, USUAL_DENSITY, USUAL_FRACTION, Choice, Space, dense_steps_of, refuse_base
from .clips import Clip, make_clip, measured, refuse_pipeline
from .error_model import ErrorModel
from .ladder import Ladder, Point, front
from .lists import Trajectory
from .result import Row, Tuned
from .state import Outcome, State
from .target import Target, error_of
from .time_model import RunSeconds, TimeModel

FRONT, PICTURE = "front.json", "front.png"


def tune(
    pipe: Any,
    prompts: Sequence[str | Mapping[str, Any]],
    target: Target | str = "psnr=35",
    *,
    recipe: Recipe | str = "mass",
    out: str | Path | None = None,
    seeds: Sequence[int] | None = None,
    generate_kwargs: Mapping[str, Any] | None = None,
    verify: int = 4,
    start_over: bool = False,
    progress: Callable[[Progress], None] = lambda _state: None,
) -> Tuned:
    """Choose dense phase, density and the list of computed steps together, for an error or a time that is named.

    Every prompt is run dense once, then with a few lists alone and a few densities alone. Errors of both add up, and
    every step of one kind takes as long as another, so that these runs predict all combinations. The best ones are
    run until one meets the target. What is returned was run: its error is the measured one.

    Args:
        pipe: a diffusers pipeline, not patched.
        prompts: texts, or arguments of the pipeline's call in place of one.
        target: what to keep, such as ``"psnr=35"`` (dB to dense), ``"ssim=0.95"`` or ``"lpips=0.05"``, as fast as
            possible; or ``"speedup=2.5"``, with as little error as possible. Of the mean over prompts.
        recipe: whose density and dense phase are chosen; its other fields stay.
        out: folder for the recipe (``psnr-35.json``), the front (JSON and picture), and what was run so far: a tuning
            of the same model, prompts, steps and size goes on from there, also for another target.
        seeds: of the runs, one per prompt; 0, 1, 2... if None.
        generate_kwargs: further arguments of the pipeline's call, such as size and steps.
        verify: combinations to run at most, with every prompt.
        start_over: forget what the folder holds of earlier runs.
        progress: told after every denoising step.

    Raises:
        ValueError: before the first run: a target that cannot be, a recipe without a density, what
            :func:`~dit_accel.calibration.runs.run_arguments` refuses, or a folder that cannot be written or is of
            another tuning. Afterwards: a dense run with NaN, or no recipe that meets the target; the message says
            what comes nearest, and the front is written all the same.
        MetricUnavailable: the target's metric cannot be computed here.
    """
    goal = target if isinstance(target, Target) else Target.read(target)
    base = presets.resolve(recipe)
    arguments = run_arguments(pipe, prompts, generate_kwargs, seeds)
    refuse_tuning(goal, base, verify, None if out is None else Path(out))
    refuse_pipeline(pipe, {name: value for one in arguments for name, value in one.items()})
    with patch(pipe, base.with_fields({"reuse": "listed"})):
        pass  # before hours go into dense runs
    numbers = tuple(range(len(prompts)) if seeds is None else seeds)
    asked = _asked(pipe, prompts, numbers, generate_kwargs or {}, base)
    state = State.begin(None if out is None else Path(out), asked, start_over)
    runs = _Runs(pipe, base, goal, arguments, numbers, state, _Clock(progress))
    with said_once():
        found = runs.find(verify)
    if out is not None:
        write(found, Path(out))
    if not found.is_met:
        raise ValueError(found.refusal())
    return found


def refuse_tuning(target: Target, recipe: Recipe, verify: int, out: Path | None) -> None:
    """Check what can be known before the model is loaded.

    Raises:
        ValueError: a recipe without a density, no run to verify by, or a folder that cannot be written.
        MetricUnavailable: the target's metric needs what is not installed.
    """
    refuse_base(recipe)
    if verify < 1:
        raise ValueError(f"verify must be at least 1, got {verify}.")
    if target.name == "lpips":
        find_weights()
    if out is not None:
        refuse_unwritable_folder(out)


def recipe_path(folder: Path, target: Target) -> Path:
    """Where the recipe for a target is written."""
    return folder / f"{target.name}-{target.value:g}.json"


def write(found: Tuned, folder: Path) -> None:
    """Write the recipe, where it meets the target, and the front.

    Raises:
        ValueError: a file cannot be written.
    """
    if found.is_met:
        found.recipe.save(recipe_path(folder, found.target))
    write_text(folder / FRONT, json.dumps(found.to_dict(), indent=1) + "\n")
    found.plot(folder / PICTURE)


def _asked(
    pipe: Any, prompts: Sequence[Any], seeds: Sequence[int], arguments: Mapping[str, Any], base: Recipe
) -> dict[str, Any]:
    """All that runs depend on; the target is not among it."""
    from .. import __version__

    device = torch.device(pipe.device)
    return {
        "dit_accel": __version__,
        "prompts": describe(prompts),
        "seeds": list(seeds),
        "arguments": describe(arguments),
        "recipe": base.to_dict(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "compiled": compiles(pipe),
        "pipeline": describe_pipeline(pipe),
    }


@dataclass
class _Clock:
    """Clips made, and how long the rest will take.

    Attributes:
        clips: of the whole tuning, at most.
        made: of these, also by earlier runs of it.
    """

    progress: Callable[[Progress], None]
    clips: int = 0
    made: int = 0
    stage: str = "dense"
    _ran: int = 0
    _begin: float = field(default_factory=time.perf_counter)

    def tick(self, step: int, steps: int) -> None:
        """Behind a step of a run of so many."""
        self._ran += 1
        done, total = self.made * steps + step + 1, self.clips * steps
        spent = time.perf_counter() - self._begin
        self.progress(Progress(done, total, spent / self._ran * (total - done), self.stage))


class _Runs:
    """The runs of a tuning, and what they predict."""

    def __init__(
        self,
        pipe: Any,
        base: Recipe,
        target: Target,
        arguments: Sequence[dict[str, Any]],
        seeds: Sequence[int],
        state: State,
        clock: _Clock,
    ) -> None:
        self.pipe, self.base, self.target, self.arguments, self.seeds = pipe, base, target, arguments, seeds
        self.state, self.clock = state, clock
        self._warm: set[bool] = set()

    def find(self, verify: int) -> Tuned:
        # Until the number of steps is known: as many as there may be.
        self.clock.clips = len(self.arguments) * (1 + MOST_PARTS + verify)
        self.clock.made = len(self.state.dense) + sum(map(len, self.state.runs.values()))
        self._run_dense()
        space = Space(self.base, Trajectory.mean([trajectory for _, trajectory in self.state.dense]))
        plan = space.measured()
        verified = self.state.verified.setdefault(str(self.target), [])
        others = [one for one in self.state.runs if one not in verified]
        others = [one for one in others if Choice.of(one, space.num_steps) not in plan]
        self.clock.clips = len(self.arguments) * (1 + len(plan) + len(others) + max(verify, len(verified)))
        for choice in plan:
            self._run(space, choice, "parts")
        for recipe in verified:
            self._run(space, Choice.of(recipe, space.num_steps), "verifying")
        while len(verified) < verify and (promising := self._ladder(space).next()) is not None:
            verified.append(space.recipe(promising))
            self._run(space, promising, "verifying")
        return self._report(space)

    def _run_dense(self) -> None:
        for number in range(len(self.state.dense), len(self.arguments)):
            clip = self._make(None, number)
            if not clip.finite:
                raise ValueError(f"the dense pipeline gave NaN or infinite pixels for prompt {number}.")
            self.state.add_dense(clip.frames, clip.seconds, clip.trajectory)
            self.clock.made += 1
        counts = {len(seconds.steps) for seconds, _ in self.state.dense}
        if len(counts) > 1:
            raise ValueError(f"The prompts must share one number of steps, got {', '.join(map(str, sorted(counts)))}.")

    def _run(self, space: Space, choice: Choice, stage: str) -> None:
        """With every prompt that it was not run with yet."""
        recipe = space.recipe(choice)
        self.clock.stage = stage
        for number in range(len(self.state.runs.get(recipe, ())), len(self.arguments)):
            clip = self._make(recipe, number)
            try:
                metrics = measured(self.state.dense_frames(number), clip, self._metrics())
            except ValueError as error:
                raise ValueError(f"{choice.spelled(space.num_steps)}, prompt {number}: {error}") from error
            self.state.add(recipe, Outcome(clip.seconds, metrics, clip.notes))
            self.clock.made += 1

    def _metrics(self) -> tuple[str, ...]:
        """All that a later target may ask for."""
        names = ["psnr", "ssim", "lpips"]
        try:
            find_weights()
        except MetricUnavailable:
            names.remove("lpips")
        smallest = min(self.state.dense_frames(0).shape[1:3])
        if smallest < 64:
            # Windows and strides of the others do not fit into every picture; the target's own says so.
            names = ["psnr"]
        return tuple(dict.fromkeys([*names, self.target.metric.name]))

    def _make(self, recipe: Recipe | None, number: int) -> Clip:
        """A clip; before it an untimed run, where the first compiles or tunes something: once for each kind of
        attention, and before every run of compiled code, which patching discards."""
        sparse = recipe is not None and not recipe.select.is_dense
        short = None
        if sparse not in self._warm or compiles(self.pipe):
            self._warm.add(sparse)
            steps = len(self.state.dense[0][0].steps) if self.state.dense else LONG_WARM_UP_STEPS
            short = shortened(self.pipe, self.arguments[number], min(LONG_WARM_UP_STEPS, steps))
        return make_clip(self.pipe, recipe, self.arguments[number], self.seeds[number], short, self.clock.tick)

    def _ladder(self, space: Space) -> Ladder:
        dense = [seconds for seconds, _ in self.state.dense]
        outcomes = {Choice.of(recipe, space.num_steps): found for recipe, found in self.state.runs.items()}
        complete = {choice: found for choice, found in outcomes.items() if len(found) == len(self.arguments)}
        name = self.target.metric.name
        points = {
            choice: Point(
                choice,
                _errors(name, found),
                statistics.fmean(one.seconds.total for one in found),
            )
            for choice, found in complete.items()
        }
        parts = {choice: points[choice].errors.tolist() for choice in space.measured()}
        usual = Choice(USUAL_DENSITY, dense_steps_of(USUAL_FRACTION, space.num_steps))
        model = ErrorModel.fit(parts, {choice: space.score(choice) for choice in parts}, usual)
        seconds = TimeModel.fit(self._timed(space, dense))
        predicted = [
            Point(
                choice,
                model.errors(choice, space.score(choice)),
                seconds.seconds(space.recipe(choice), space.num_steps),
            )
            for choice in space.all()
        ]
        return Ladder(self.target, statistics.fmean(one.total for one in dense), predicted, points)

    def _timed(self, space: Space, dense: Sequence[RunSeconds]) -> list[tuple[Recipe, RunSeconds]]:
        parts = [space.recipe(choice) for choice in space.measured()]
        return [
            *((Recipe(), one) for one in dense),
            *((recipe, one.seconds) for recipe in parts for one in self.state.runs[recipe]),
        ]

    def _report(self, space: Space) -> Tuned:
        ladder = self._ladder(space)
        predicted = {point.choice: point for point in ladder.predicted}

        def row(point: Point) -> Row:
            was_run = point.choice in ladder.measured
            guess = predicted.get(point.choice) if was_run else None
            return Row(
                point.choice.spelled(space.num_steps),
                space.recipe(point.choice),
                ladder.fidelity(point),
                point.seconds,
                ladder.speedup(point),
                was_run,
                None if guess is None else (ladder.fidelity(guess), guess.seconds),
            )

        left = [point for point in ladder.expected() if point.choice not in ladder.measured]
        runs = sorted(ladder.measured.values(), key=lambda one: one.seconds)
        found = row(ladder.best() or ladder.nearest())
        return Tuned(
            self.target,
            found,
            tuple(row(point) for point in front([*left, *runs])),
            tuple(row(point) for point in runs),
            ladder.dense_seconds,
            space.num_steps,
            len(self.arguments),
            tuple(dict.fromkeys(note for one in self.state.runs[found.recipe] for note in one.notes)),
        )


def _errors(name: str, found: Sequence[Outcome]) -> Any:
    return np.asarray([error_of(name, one.metrics[name]) for one in found])
