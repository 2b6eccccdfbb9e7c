"""The same prompts and seeds, dense and under recipes: generate, measure, report."""

from __future__ import annotations

import platform
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch

from ..records import backend_lines
from .clips import save_clip
from .generation import Generated, generate_clip, shortened
from .measurement import Measurement
from .metrics import Metric, find_metrics, measure
from .prompts import DEFAULT_PROMPTS
from .report import write_report
from .results import DENSE, ClipResult, ComparisonReport
from .video import ClipPair, to_uint8

_WARM_UP_STEPS = 2


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


@dataclass(frozen=True)
class _Counts:
    """Running totals of a patch; two of them differ by what happened in between."""

    calls: int
    kept: float
    seconds: float

    @classmethod
    def of(cls, summary: RunSummary) -> _Counts:
        calls = summary.sparse_calls + sum(summary.dense_calls.values())
        seconds = summary.plan_seconds + summary.sparse_seconds + summary.dense_seconds
        return cls(calls, (summary.mean_density or 0.0) * calls, seconds)

    def density_since(self, before: _Counts) -> float | None:
        calls = self.calls - before.calls
        return (self.kept - before.kept) / calls if calls else None

    def seconds_since(self, before: _Counts) -> float | None:
        return self.seconds - before.seconds if self.calls > before.calls else None


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
    facts: Mapping[str, str] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> ComparisonReport:
    """Generate every prompt with every seed, dense and under each recipe, and report the differences.

    The dense clips come from the unpatched pipeline. All metrics compare 8-bit frames, which is what a viewer
    gets. A report is written after each recipe, so that a broken run leaves what it had.

    Args:
        pipe: a diffusers pipeline, not patched.
        recipes: recipe (or preset name) by display name.
        prompts, seeds: every combination is one clip.
        metrics: names from :data:`~dit_accel.quality.METRICS`; None for all.
        generate_kwargs: further arguments of the pipeline's call.
        out: folder for clips and report; made if missing.
        fps: frames per second of the saved clips.
        patch: takes the pipeline and a recipe; ``dit_accel.patch`` if None.
        dense_attention_clips: how many clips are generated once more, with timers in the dense attention
            (which does not depend on the prompt). 0 leaves dense attention time unknown.
        warm_up: first run a few steps untimed, for compilation and autotuning.
        facts: added to the report's facts, for example the command line.
        progress: called with one line per generation.

    Returns:
        The report, also written to ``out`` as ``report.json``, ``index.html`` and ``side_by_side.mp4``.

    Raises:
        ValueError: no or repeated prompts, seeds or recipes, an unknown metric, or what ``patch`` raises.
    """
    chosen = find_metrics(metrics)
    pairs = _pairs(prompts, seeds)
    if not recipes or DENSE in recipes:
        raise ValueError(f"give at least one recipe, none named {DENSE!r}, got {list(recipes)}.")
    if patch is None:
        from ..api import patch as patch_pipeline

        patch = patch_pipeline
    arguments = dict(generate_kwargs or {})
    run = _Run(pipe, pairs, chosen, arguments, Path(out), fps, patch, warm_up, progress)
    # Every recipe is tried before hours go into the first.
    for recipe in recipes.values():
        with patch(pipe, recipe):
            pass
    all_facts = {**_facts(pipe, arguments, warm_up), **(facts or {})}
    descriptions = {name: recipe if isinstance(recipe, str) else "" for name, recipe in recipes.items()}
    with tempfile.TemporaryDirectory() as store:
        results = run.dense(Path(store), dense_attention_clips)
        notes: list[str] = []
        for done, (name, recipe) in enumerate(recipes.items(), start=1):
            clips, said = run.recipe(name, recipe, Path(store), done)
            results += clips
            notes += said
            report = ComparisonReport(
                pipeline=type(pipe).__name__,
                results=tuple(results),
                recipes=tuple(recipes)[:done],
                descriptions={n: d for n, d in descriptions.items() if d and d != n},
                fps=fps,
                facts=all_facts,
                notes=tuple(notes),
            )
            write_report(report, run.out)
    return report


@dataclass(frozen=True, eq=False)
class _Run:
    """What stays the same over a comparison."""

    pipe: Any
    pairs: tuple[tuple[str, int], ...]
    metrics: tuple[Metric, ...]
    arguments: Mapping[str, Any]
    out: Path
    fps: float
    patch: Patch
    warm_up: bool
    progress: Callable[[str], None]

    def dense(self, store: Path, attention_clips: int) -> list[ClipResult]:
        """Dense clips; frames and latents are kept in ``store``."""
        self._warm_up()
        seconds, files = [], []
        for i in range(len(self.pairs)):
            made = self._generate(i, DENSE)
            if not made.finite:
                raise ValueError(f"the dense pipeline gave NaN or infinite pixels for {self.pairs[i][0]!r}.")
            torch.save((to_uint8(made.frames), made.latents), store / f"{i}.pt")
            seconds.append(made.seconds)
            files.append(self._save(made, i, f"{i:03d}-00-dense"))
        attention: list[float | None] = [None] * len(self.pairs)
        if attention_clips > 0:
            with self.patch(self.pipe, "dense") as handle:
                for i in range(min(attention_clips, len(self.pairs))):
                    before = _Counts.of(handle.summary())
                    self._generate(i, "dense, with timers in its attention")
                    attention[i] = _Counts.of(handle.summary()).seconds_since(before)
        return [
            ClipResult(prompt, seed, DENSE, seconds[i], attention[i], 1.0, clip=files[i])
            for i, (prompt, seed) in enumerate(self.pairs)
        ]

    def recipe(self, name: str, recipe: Any, store: Path, number: int) -> tuple[list[ClipResult], list[str]]:
        """Clips under a recipe with their fidelity, and what a reader must know about them."""
        results = []
        with self.patch(self.pipe, recipe) as handle:
            self._warm_up()
            warm = handle.summary()
            for i, (prompt, seed) in enumerate(self.pairs):
                before = _Counts.of(handle.summary())
                made = self._generate(i, name)
                after = _Counts.of(handle.summary())
                results.append(
                    ClipResult(
                        prompt,
                        seed,
                        name,
                        made.seconds,
                        after.seconds_since(before),
                        after.density_since(before),
                        self._measure(made, store / f"{i}.pt"),
                        self._save(made, i, f"{i:03d}-{number:02d}-{_file_name(name)}"),
                    )
                )
            notes = _notes(name, warm, handle.summary())
        return results, notes

    def _measure(self, made: Generated, dense: Path) -> dict[str, Measurement]:
        if not made.finite:
            reason = "the clip holds NaN or infinite pixels."
            return {metric.name: Measurement(reason=reason) for metric in self.metrics}
        levels, latents = torch.load(dense, weights_only=True)
        return measure(ClipPair(levels, to_uint8(made.frames), self.fps, latents, made.latents), self.metrics)

    def _warm_up(self) -> None:
        if self.warm_up:
            prompt, seed = self.pairs[0]
            generate_clip(self.pipe, prompt, seed, shortened(self.pipe, self.arguments, _WARM_UP_STEPS))

    def _generate(self, i: int, title: str) -> Generated:
        prompt, seed = self.pairs[i]
        made = generate_clip(self.pipe, prompt, seed, self.arguments)
        self.progress(f"[{i + 1}/{len(self.pairs)}] {title}: {made.seconds:.2f} s, {prompt!r}, seed {seed}")
        return made

    def _save(self, made: Generated, i: int, stem: str) -> str:
        path = save_clip(made.frames, self.out / "clips" / stem, self.fps)
        return path.relative_to(self.out).as_posix()


def _pairs(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[tuple[str, int], ...]:
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a sequence of strings, got the string {prompts!r}.")
    named: dict[str, Sequence[object]] = {"prompts": prompts, "seeds": seeds}
    for name, values in named.items():
        if not values or len(set(values)) != len(values):
            raise ValueError(f"{name} must be a non-empty sequence without repeats, got {list(values)}.")
    return tuple((prompt, seed) for prompt in prompts for seed in seeds)


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def _notes(name: str, warm: RunSummary, end: RunSummary) -> list[str]:
    """Fallbacks and failures after the warm-up, as sentences."""
    dense = Counter(dict(end.dense_calls))
    dense.subtract(warm.dense_calls)
    sparse = end.sparse_calls - warm.sparse_calls
    dense_total = sum(dense.values())
    notes = []
    if dense_total:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dense.items() if count)
        notes.append(f"{name}: {dense_total} of {sparse + dense_total} self-attention calls ran dense ({reasons}).")
    if not sparse + dense_total:
        notes.append(f"{name}: no self-attention call went through the patch.")
    nan_calls = end.nan_calls - warm.nan_calls
    if nan_calls:
        notes.append(f"{name}: {nan_calls} attention calls gave NaN.")
    notes += [f"{name}: {line}." for line in backend_lines(end.backends)]
    return notes


def _facts(pipe: Any, arguments: Mapping[str, Any], warm_up: bool) -> dict[str, str]:
    """Device, versions and settings, as text."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    settings = {name: value for name, value in arguments.items() if isinstance(value, (str, int, float, bool))}
    return {
        "device": device,
        "versions": ", ".join(
            f"{name} {found}"
            for name in ("dit-accel", "torch", "diffusers", "triton")
            if (found := _version(name)) is not None
        ),
        "settings": ", ".join(f"{name}={value}" for name, value in settings.items()) or "pipeline defaults",
        "warm-up": f"{_WARM_UP_STEPS} untimed steps before dense and before each recipe" if warm_up else "none",
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
