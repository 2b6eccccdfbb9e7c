"""The same prompts and seeds, dense and under recipes: generate in turns, measure, report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ..files import refuse_unwritable_folder
from .clips import save_clip
from .compare_facts import Tally, describe
from .generation import Generated, compiles, generate_clip, shortened
from .measurement import Measurement
from .metrics import Metric, find_metrics, measure
from .prompts import DEFAULT_PROMPTS
from .report import write_json, write_report
from .results import DENSE, ClipResult, ComparisonReport
from .turns import WARM_UP_STEPS, Timing, in_turns
from .video import ClipPair


class RunSummary(Protocol):
    """What a patch did so far; the part of ``dit_accel.patches.PatchSummary`` used here."""

    @property
    def sparse_calls(self) -> int: ...
    @property
    def dense_calls(self) -> Mapping[str, int]: ...
    @property
    def nan_calls(self) -> int: ...
    @property
    def mean_density(self) -> float | None: ...
    @property
    def backends(self) -> Mapping[str, Mapping[str, str]]: ...
    @property
    def plan_seconds(self) -> float: ...
    @property
    def sparse_seconds(self) -> float: ...
    @property
    def dense_seconds(self) -> float: ...


class Handle(AbstractContextManager[Any], Protocol):
    """A patch in force: leaving its context removes it."""

    def summary(self) -> RunSummary:
        """What ran so far."""


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
    repeat: int = 1,
    facts: Mapping[str, str] | None = None,
    progress: Callable[[str], None] = lambda _line: None,
) -> ComparisonReport:
    """Generate every prompt with every seed, dense and under each recipe, and report the differences.

    Dense and the recipes take turns, clip by clip, in the reverse order for every second clip. The dense clips come
    from the unpatched pipeline. A recipe's patch is made anew for every run, so that each is what a user's first run
    gives; nothing is kept from a warm-up or another clip. Patching discards compiled code: where the pipeline is
    compiled, an untimed run goes before each timed one, and the clips are those of the untimed.

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
        repeat: timed runs of each clip, dense and under each recipe. Clips and metrics are the first run's.
        facts: added to the report's facts, for example the command line.
        progress: called with one line per generation.

    Returns:
        The report, also written to ``out`` as ``report.json``, ``index.html`` and ``side_by_side.mp4``.

    Raises:
        ValueError: no or repeated prompts, seeds or recipes, an unknown metric, a folder that cannot be written, less
            than one run, dense clips with NaN, or what ``patch`` raises.
    """
    chosen = find_metrics(metrics)
    pairs = _pairs(prompts, seeds)
    if not recipes or DENSE in recipes:
        raise ValueError(f"give at least one recipe, none named {DENSE!r}, got {list(recipes)}.")
    if repeat < 1:
        raise ValueError(f"repeat must be at least 1, got {repeat}.")
    refuse_unwritable_folder(Path(out))
    if patch is None:
        from ..api import patch as patch_pipeline

        patch = patch_pipeline
    arguments = dict(generate_kwargs or {})
    run = _Run(pipe, recipes, pairs, chosen, arguments, Path(out), fps, patch, repeat, progress)
    # Every recipe is tried before hours go into the first.
    for recipe in recipes.values():
        with patch(pipe, recipe):
            pass
    steps = min(WARM_UP_STEPS, arguments.get("num_inference_steps", WARM_UP_STEPS)) if warm_up else 0
    if warm_up:
        run.warm_up(steps)
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
            notes=tuple(note for name in recipes for note in run.tallies[name].notes(name)),
        )

    try:
        for i in range(len(pairs)):
            results += run.clip(i, timers=i < dense_attention_clips)
            write_json(report(), run.out)
    finally:
        if results:
            write_report(report(), run.out)
    return report()


@dataclass(frozen=True, eq=False)
class _Run:
    """What stays the same over a comparison, and what its runs added up to."""

    pipe: Any
    recipes: Mapping[str, Any]
    pairs: tuple[tuple[str, int], ...]
    metrics: tuple[Metric, ...]
    arguments: Mapping[str, Any]
    out: Path
    fps: float
    patch: Patch
    repeat: int
    progress: Callable[[str], None]
    tallies: dict[str, Tally] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tallies.update({name: Tally() for name in self.recipes})

    def warm_up(self, steps: int) -> None:
        """A few untimed steps of dense and of each recipe, at the size that is measured."""
        prompt, seed = self.pairs[0]
        short = shortened(self.pipe, self.arguments, steps)
        generate_clip(self.pipe, prompt, seed, short)
        for name, recipe in self.recipes.items():
            with self.patch(self.pipe, recipe) as handle:
                generate_clip(self.pipe, prompt, seed, short)
                self.tallies[name].warmed_up(handle.summary())

    def clip(self, i: int, timers: bool) -> list[ClipResult]:
        """One clip dense and under each recipe: runs in turns, then metrics.

        Args:
            timers: generate the dense clip once more, with timers in its attention.
        """
        variants = {name: partial(self._timed, i, name) for name in (DENSE, *self.recipes)}
        clips: dict[str, tuple[Generated, RunSummary | None]] = {}
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for name, (made, summary) in in_turns(variants, self.repeat, first=i * self.repeat):
            if name == DENSE and not made.finite:
                raise ValueError(f"the dense pipeline gave NaN or infinite pixels for {self.pairs[i][0]!r}.")
            seconds[name].append(made.seconds)
            if name not in clips:
                clips[name] = made, summary
                if summary is not None:
                    self.tallies[name].add(summary)
        dense, _ = clips[DENSE]
        results = [self._result(i, number, name, *clips[name], seconds[name]) for number, name in enumerate(variants)]
        for n, name in enumerate(self.recipes, start=1):
            results[n] = replace(results[n], metrics=self._measure(clips[name][0], dense))
        if timers:
            results[0] = replace(results[0], attention_seconds=self._dense_attention(i))
        return results

    def _timed(self, i: int, name: str) -> tuple[Generated, RunSummary | None]:
        """One timed run; under a recipe with what its patch did, which is made for this run alone."""
        fresh = nullcontext() if name == DENSE else self.patch(self.pipe, self.recipes[name])
        with fresh as handle:
            made = self._generate(i)
            summary = None if handle is None else handle.summary()
            if compiles(self.pipe):
                # That run compiled. The next one is timed, and must be the same, whatever the patch has kept.
                again = self._generate(i)
                if name != DENSE and not again.frames.equal(made.frames):
                    self.tallies[name].differing += 1
                made = replace(made, seconds=again.seconds)
        self._tell(i, name, made.seconds)
        return made, summary

    def _dense_attention(self, i: int) -> float | None:
        """Seconds of dense attention in a further run."""
        with self.patch(self.pipe, DENSE) as handle:
            made = self._generate(i)
            seconds = attention_seconds(handle.summary())
        self._tell(i, "dense, with timers in its attention", made.seconds)
        return seconds

    def _result(
        self, i: int, number: int, name: str, made: Generated, summary: RunSummary | None, seconds: Sequence[float]
    ) -> ClipResult:
        path = save_clip(made.frames, self.out / "clips" / f"{i:03d}-{number:02d}-{_file_name(name)}", self.fps)
        prompt, seed = self.pairs[i]
        return ClipResult(
            prompt,
            seed,
            name,
            Timing(tuple(seconds)).median,
            None if summary is None else attention_seconds(summary),
            1.0 if summary is None else summary.mean_density,
            clip=path.relative_to(self.out).as_posix(),
            runs=tuple(seconds) if len(seconds) > 1 else (),
        )

    def _measure(self, made: Generated, dense: Generated) -> dict[str, Measurement]:
        if not made.finite:
            reason = "the clip holds NaN or infinite pixels."
            return {metric.name: Measurement(reason=reason) for metric in self.metrics}
        return measure(ClipPair(dense.frames, made.frames, self.fps, dense.latents, made.latents), self.metrics)

    def _generate(self, i: int) -> Generated:
        prompt, seed = self.pairs[i]
        return generate_clip(self.pipe, prompt, seed, self.arguments).in_8_bits()

    def _tell(self, i: int, title: str, seconds: float) -> None:
        prompt, seed = self.pairs[i]
        self.progress(f"[{i + 1}/{len(self.pairs)}] {title}: {seconds:.2f} s, {prompt!r}, seed {seed}")


def attention_seconds(summary: RunSummary) -> float | None:
    """Seconds in self-attention, planning included; None where no call was seen."""
    calls = summary.sparse_calls + sum(summary.dense_calls.values())
    return summary.plan_seconds + summary.sparse_seconds + summary.dense_seconds if calls else None


def _pairs(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[tuple[str, int], ...]:
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
