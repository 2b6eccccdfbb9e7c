"""The same prompts and seeds, dense and under recipes: generate in turns, measure, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ..files import refuse_unwritable_folder
from ..parts import Parts
from .clips import save_clip
from .compare_facts import describe
from .generation import Generated, compiles, generate_clip, shortened
from .measurement import Measurement
from .metrics import Metric, find_metrics, measure
from .prompts import DEFAULT_PROMPTS
from .ran import Ran, RunSummary, notes
from .report import write_json, write_report
from .results import DENSE, ClipResult, ComparisonReport, result_from_json, result_to_json
from .turns import WARM_UP_STEPS, Timing, in_turns
from .video import ClipPair


class Handle(AbstractContextManager[Any], Protocol):
    """A patch in force: leaving its context removes it."""

    def summary(self) -> RunSummary:
        """What ran so far."""

    def reset(self) -> None:
        """Begin the counts anew."""


Patch = Callable[[Any, Any], Handle]
"""``dit_accel.patch``, or a partial of it: takes a pipeline and a recipe."""


def compare(
    pipe: Any,
    recipes: Mapping[str, Any],
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    seeds: Sequence[int] = (0,),
    *,
    metrics: Iterable[str] | None = None,
    generate_kwargs: Mapping[str, Any] | None = None,
    out: Path | str,
    fps: float = 16.0,
    patch: Patch | None = None,
    dense_attention_clips: int = 1,
    warm_up: bool = True,
    warm_up_steps: int = WARM_UP_STEPS,
    repeat: int = 1,
    facts: Mapping[str, str] | None = None,
    pictures: bool = True,
    parts: Parts | None = None,
    on_clip: Callable[[str, str, int, Generated], None] = lambda _name, _prompt, _seed, _made: None,
    on_report: Callable[[ComparisonReport], None] = lambda _report: None,
    progress: Callable[[str], None] = lambda _line: None,
) -> ComparisonReport:
    """Generate every prompt with every seed, dense and under each recipe, and report the differences.

    Dense and the recipes take turns, clip by clip, in the reverse order for every second clip. The dense clips come
    from the unpatched pipeline. A recipe's patch is made anew for every run, so that each is what a user's first run
    gives; nothing is kept from a warm-up or another clip. Patching discards compiled code: where the pipeline is
    compiled, a short untimed run goes before each timed one, under the same patch. Clips, metrics and seconds are of
    the same runs.

    All metrics compare 8-bit frames, which is what a viewer gets. The JSON is written after each clip, the page and
    the film at the end or when a run breaks.

    Args:
        pipe: a diffusers pipeline, not patched.
        recipes: recipe, preset name, or None for what ``patch(pipe)`` does by itself, by display name.
        prompts, seeds: every combination is one clip.
        metrics: names from :data:`~dit_accel.quality.METRICS`; None for all.
        generate_kwargs: further arguments of the pipeline's call.
        out: folder for clips and report; made if missing.
        fps: frames per second of the saved clips.
        patch: takes the pipeline and a recipe; ``dit_accel.patch`` if None.
        dense_attention_clips: how many clips are generated once more, with timers in the dense attention
            (which does not depend on the prompt). 0 leaves dense attention time unknown.
        warm_up: first run a few steps of dense and of each recipe untimed, for compilation and autotuning.
        warm_up_steps: how many, and of the short runs of a compiled pipeline.
        repeat: timed runs of each clip, dense and under each recipe. Clips and metrics are the first run's.
        facts: added to the report's facts, for example the command line.
        pictures: whether clips are saved, and shown on the page and in the film.
        parts: where finished clips are kept, in a folder that was claimed for these very settings: those that are there
            are not made again. None keeps none.
        on_clip: called with each clip that is made, by the name of its recipe, prompt and seed.
        on_report: called behind each clip that is made, with the report so far.
        progress: called with one line per generation.

    Returns:
        The report, also written to ``out`` as ``report.json``, ``index.html`` and ``side_by_side.mp4``.

    Raises:
        ValueError: no or repeated prompts, seeds or recipes, an unknown metric, a folder that cannot be written, less
            than one run, dense clips with NaN, or what ``patch`` raises.
    """
    chosen = find_metrics(metrics)
    pairs = clip_pairs(prompts, seeds)
    if not recipes or DENSE in recipes:
        raise ValueError(f"give at least one recipe, none named {DENSE!r}, got {list(recipes)}.")
    if repeat < 1:
        raise ValueError(f"repeat must be at least 1, got {repeat}.")
    refuse_unwritable_folder(Path(out))
    if patch is None:
        from ..api import patch as patch_pipeline

        patch = patch_pipeline
    arguments = dict(generate_kwargs or {})
    steps = min(warm_up_steps, arguments.get("num_inference_steps", warm_up_steps))
    run = _Run(
        pipe, recipes, pairs, chosen, arguments, Path(out), fps, patch, repeat, steps, pictures, on_clip, progress
    )
    known = [None if parts is None else _finished(parts, i) for i in range(len(pairs))]
    missing = [i for i, part in enumerate(known) if part is None]
    # Every recipe is tried before hours go into the first.
    for recipe in recipes.values():
        with patch(pipe, recipe):
            pass
    steps = steps if warm_up else 0
    if warm_up and missing:
        run.warm_up()
    all_facts = {**describe(pipe, arguments, steps, repeat, compiles(pipe)), **(facts or {})}
    results: list[ClipResult] = []

    def report() -> ComparisonReport:
        return ComparisonReport(
            pipeline=type(pipe).__name__,
            results=tuple(results),
            recipes=tuple(recipes),
            descriptions=_descriptions(recipes),
            fps=fps,
            facts=all_facts,
            notes=tuple(note for name in recipes for note in run.notes(name, results)),
        )

    run.begin(len(missing))
    try:
        for i, part in enumerate(known):
            if part is not None:
                results += part[0]
                run.warm_sparse.update(part[1])
                continue
            made = run.clip(i, timers=i < dense_attention_clips)
            results += made
            if parts is not None:
                parts.write(_part(i), {"results": [*map(result_to_json, made)], "warm_sparse": run.warm_sparse})
            write_json(report(), run.out)
            on_report(report())
    finally:
        if results:
            write_report(report(), run.out)
    return report()


@dataclass(frozen=True, eq=False)
class _Run:
    """What stays the same over a comparison, what its warm-up ran, and how far it is."""

    pipe: Any
    recipes: Mapping[str, Any]
    pairs: tuple[tuple[str, int], ...]
    metrics: tuple[Metric, ...]
    arguments: Mapping[str, Any]
    out: Path
    fps: float
    patch: Patch
    repeat: int
    short_steps: int
    pictures: bool
    on_clip: Callable[[str, str, int, Generated], None]
    progress: Callable[[str], None]
    warm_sparse: dict[str, int] = field(default_factory=dict)
    clock: _Clock = field(default_factory=lambda: _Clock())

    def warm_up(self) -> None:
        """A few untimed steps of dense and of each recipe, at the size that is measured."""
        self._short(0)
        for name, recipe in self.recipes.items():
            with self.patch(self.pipe, recipe) as handle:
                self._short(0)
                self.warm_sparse[name] = handle.summary().sparse_calls

    def begin(self, clips: int) -> None:
        """So many clips are to be made."""
        self.clock.begin(clips * self.repeat * (1 + len(self.recipes)))

    def notes(self, name: str, results: Sequence[ClipResult]) -> list[str]:
        """What a reader must know of a recipe."""
        runs = [result.ran for result in results if result.recipe == name and result.ran is not None]
        return notes(name, runs, self.warm_sparse.get(name))

    def clip(self, i: int, timers: bool) -> list[ClipResult]:
        """One clip dense and under each recipe: runs in turns, then metrics.

        Args:
            timers: generate the dense clip once more, with timers in its attention.
        """
        variants = {name: partial(self._timed, i, name) for name in (DENSE, *self.recipes)}
        clips: dict[str, tuple[Generated, RunSummary | None]] = {}
        timed: dict[str, list[Generated]] = {name: [] for name in variants}
        for name, (made, summary) in in_turns(variants, self.repeat, first=i * self.repeat):
            if name == DENSE and not made.finite:
                raise ValueError(f"the dense pipeline gave NaN or infinite pixels for {self.pairs[i][0]!r}.")
            clips.setdefault(name, (made, summary))
            # Of the others only the seconds are kept.
            timed[name].append(made if len(timed[name]) == 0 else replace(made, frames=made.frames[:0], latents=None))
        results = [self._result(i, number, name, timed[name], clips[name][1]) for number, name in enumerate(variants)]
        dense, _ = clips[DENSE]
        # Of the dense clip alone is found once what metrics of several recipes need.
        pair = ClipPair(dense.frames, dense.frames, self.fps, dense.latents)
        for n, name in enumerate(self.recipes, start=1):
            results[n] = replace(results[n], metrics=self._measure(clips[name][0], pair))
        for name in variants:
            self.on_clip(name, *self.pairs[i], clips[name][0])
        if timers:
            results[0] = replace(results[0], attention_seconds=self._dense_attention(i))
        return results

    def _timed(self, i: int, name: str) -> tuple[Generated, RunSummary | None]:
        """One timed run; under a recipe with what its patch did, which is made for this run alone."""
        fresh = nullcontext() if name == DENSE else self.patch(self.pipe, self.recipes[name])
        with fresh as handle:
            if compiles(self.pipe):
                self._short(i)
                if handle is not None:
                    handle.reset()
            made = self._generate(i)
            summary = None if handle is None else handle.summary()
        self._tell(i, name, made.seconds, self.clock.ran())
        return made, summary

    def _short(self, i: int) -> None:
        prompt, seed = self.pairs[i]
        generate_clip(self.pipe, prompt, seed, shortened(self.pipe, self.arguments, self.short_steps))

    def _dense_attention(self, i: int) -> float | None:
        """Seconds of dense attention in a further run."""
        with self.patch(self.pipe, DENSE) as handle:
            made = self._generate(i)
            seconds = attention_seconds(handle.summary())
        self._tell(i, "dense, with timers in its attention", made.seconds)
        return seconds

    def _result(
        self, i: int, number: int, name: str, runs: Sequence[Generated], summary: RunSummary | None
    ) -> ClipResult:
        path = None
        if self.pictures:
            stem = self.out / "clips" / f"{i:03d}-{number:02d}-{_file_name(name)}"
            path = save_clip(runs[0].frames, stem, self.fps).relative_to(self.out).as_posix()
        prompt, seed = self.pairs[i]
        frames, height, width, _ = runs[0].frames.shape
        seconds = tuple(run.seconds for run in runs)
        stages = tuple(run.stages for run in runs if run.stages is not None)
        return ClipResult(
            prompt,
            seed,
            name,
            Timing(seconds).median,
            None if summary is None else attention_seconds(summary),
            1.0 if summary is None else summary.mean_density,
            clip=path,
            runs=seconds if len(seconds) > 1 else (),
            stages=stages if len(stages) == len(runs) else (),
            ran=None if summary is None else Ran.of(summary),
            shape=(frames, height, width),
        )

    def _measure(self, made: Generated, pair: ClipPair) -> dict[str, Measurement]:
        if not made.finite:
            reason = "the clip holds NaN or infinite pixels."
            return {metric.name: Measurement(reason=reason) for metric in self.metrics}
        return measure(pair.beside(made.frames, made.latents), self.metrics)

    def _generate(self, i: int) -> Generated:
        prompt, seed = self.pairs[i]
        return generate_clip(self.pipe, prompt, seed, self.arguments)

    def _tell(self, i: int, title: str, seconds: float, left: str = "") -> None:
        prompt, seed = self.pairs[i]
        self.progress(f"[{i + 1}/{len(self.pairs)}] {title}: {seconds:.2f} s, {prompt!r}, seed {seed}{left}")


class _Clock:
    """How long the rest takes, if a run takes as long as those so far."""

    def __init__(self) -> None:
        self._start, self._runs, self._done = time.perf_counter(), 0, 0

    def begin(self, runs: int) -> None:
        """So many runs are to come."""
        self._start, self._runs, self._done = time.perf_counter(), runs, 0

    def ran(self) -> str:
        """After a run: the time left, to stand behind its line; nothing behind the last."""
        self._done += 1
        left = (time.perf_counter() - self._start) / self._done * (self._runs - self._done)
        if self._done >= self._runs:
            return ""
        return f"; about {left:.0f} s left" if left < 100 else f"; about {left / 60:.0f} min left"


def _finished(parts: Parts, i: int) -> tuple[list[ClipResult], dict[str, int]] | None:
    """What is kept of a clip, with the sparse calls of its run's warm-up; None where it is not made yet.

    Raises:
        ValueError: its file is damaged.
    """
    kept = parts.read(_part(i))
    try:
        return None if kept is None else ([*map(result_from_json, kept["results"])], dict(kept["warm_sparse"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{parts.path(_part(i))} holds no clip of a comparison; delete it, or {parts.advice}."
        ) from error


def _part(i: int) -> str:
    """Name of what is kept of a clip."""
    return f"{i:04d}"


def attention_seconds(summary: RunSummary) -> float | None:
    """Seconds in self-attention, planning included; None where no call was seen, or some had no time of their own."""
    if summary.replayed_calls:
        return None
    calls = summary.sparse_calls + sum(summary.dense_calls.values())
    return summary.plan_seconds + summary.sparse_seconds + summary.dense_seconds if calls else None


def clip_pairs(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[tuple[str, int], ...]:
    """Every prompt with every seed.

    Raises:
        ValueError: none, or one twice.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a sequence of strings, got the string {prompts!r}.")
    named: dict[str, Sequence[object]] = {"prompts": prompts, "seeds": seeds}
    for name, values in named.items():
        if not values or len(set(values)) != len(values):
            raise ValueError(f"{name} must be a non-empty sequence without repeats, got {list(values)}.")
    return tuple((prompt, seed) for prompt in prompts for seed in seeds)


def _descriptions(recipes: Mapping[str, Any]) -> dict[str, str]:
    """What a recipe's name does not say: the preset, or that there is none."""
    said = {name: "patch(pipe) without a recipe" for name, recipe in recipes.items() if recipe is None}
    return said | {name: recipe for name, recipe in recipes.items() if isinstance(recipe, str) and recipe != name}


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)
