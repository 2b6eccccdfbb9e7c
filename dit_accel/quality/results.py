"""A comparison as plain data: per-clip results, their summary per recipe, and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .bootstrap import FEWEST_CLIPS, Interval, bootstrap_mean, bootstrap_median, range_of
from .measurement import Measurement, number_from_json, number_to_json
from .ran import Ran
from .stages import Stages
from .turns import speed_up

DENSE = "dense"
"""Name of the unpatched pipeline in place of a recipe's."""

_FORMAT = "dit_accel.comparison"
_VERSION = 1


@dataclass(frozen=True)
class ClipResult:
    """One generated clip.

    Attributes:
        prompt, seed: what was asked for; dense and recipes share the seed's noise.
        recipe: name of the recipe, or ``"dense"``.
        total_seconds: end-to-end wall time of the pipeline call, text encoding and decoding included; the median
            of ``runs``.
        attention_seconds: time inside self-attention, or None if it was not measured.
        density: true share of block pairs read, over all self-attention calls; 1 for dense, None if unknown.
        metrics: fidelity to the dense clip of this prompt and seed; empty for the dense clip itself.
        clip: path of the saved clip relative to the report's folder, or None.
        runs: wall times of all runs of this clip, in order; empty for one run.
        stages: of each run, in order; empty where the pipeline does not show them.
        ran: what the patch of the first run did; None for dense.
        shape: frames, height and width that came out; None where nobody kept them.
    """

    prompt: str
    seed: int
    recipe: str
    total_seconds: float
    attention_seconds: float | None = None
    density: float | None = None
    metrics: Mapping[str, Measurement] = field(default_factory=dict)
    clip: str | None = None
    runs: tuple[float, ...] = ()
    stages: tuple[Stages, ...] = ()
    ran: Ran | None = None
    shape: tuple[int, int, int] | None = None

    @property
    def seconds(self) -> tuple[float, ...]:
        """Wall times of all runs."""
        return self.runs or (self.total_seconds,)


@dataclass(frozen=True)
class RecipeSummary:
    """One recipe over all clips.

    Times are ranges of their runs, with the median. ``speedup`` is of the clips' ratios to dense, see
    :func:`~dit_accel.quality.turns.speed_up`. ``attention_speedup`` divides the median of the dense attention times
    that were measured (often one clip's) by each clip's own. ``metrics`` holds the metrics that gave values, as means
    over clips, ``missing`` the reasons of those that gave none on some clip. ``stages`` are the ranges of the runs'
    seconds of text, steps and decoding, empty where they are not known; ``computed_share`` is that of the forwards that
    ran all blocks. The ``kind`` of an interval says whether it is a bootstrap or the range of few clips.
    """

    recipe: str
    clips: int
    total_seconds: Interval
    speedup: Interval
    attention_seconds: Interval | None
    attention_speedup: Interval | None
    density: Interval | None
    metrics: Mapping[str, Interval]
    missing: Mapping[str, tuple[str, ...]]
    stages: Mapping[str, Interval] = field(default_factory=dict)
    computed_share: Interval | None = None

    @property
    def spread(self) -> str:
        """What the ends of the intervals are, as a sentence for readers."""
        if self.clips >= FEWEST_CLIPS:
            return f"The ends are those of a 95% bootstrap interval over {self.clips} clips, of times the extremes."
        if self.clips == 1 and self.total_seconds.count == 1:
            return "One clip, run once, has no spread."
        clips = _count(self.clips, "clip")
        return (
            f"The ends are the extremes of {clips}; fewer than {FEWEST_CLIPS} have no 95% interval. "
            "A speed-up goes up and down by the ratio of the slowest to the fastest run, of the side that varies more."
        )


@dataclass(frozen=True)
class ComparisonReport:
    """The same prompts and seeds, dense and under each recipe.

    Attributes:
        pipeline: what was compared, for the title.
        results: all clips; every recipe has the prompts and seeds that dense has.
        recipes: names in display order, without ``"dense"``.
        descriptions: optional sentence per recipe (its settings).
        fps: frames per second of the clips.
        facts: what it takes to repeat this: device, versions, command, generation settings.
        notes: what a reader must know, such as fallbacks of a recipe.
    """

    pipeline: str
    results: tuple[ClipResult, ...]
    recipes: tuple[str, ...]
    descriptions: Mapping[str, str] = field(default_factory=dict)
    fps: float = 16.0
    facts: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if DENSE in self.recipes or len(set(self.recipes)) != len(self.recipes):
            raise ValueError(f"recipe names must differ and not be {DENSE!r}, got {list(self.recipes)}.")
        keys = [(r.recipe, r.prompt, r.seed) for r in self.results]
        if len(set(keys)) != len(keys):
            raise ValueError("two results share recipe, prompt and seed.")
        wanted = set(self.pairs)
        for recipe in self.recipes:
            have = {(r.prompt, r.seed) for r in self.results if r.recipe == recipe}
            if have != wanted:
                raise ValueError(
                    f"recipe {recipe!r} has {len(have)} clips that do not match the {len(wanted)} dense ones."
                )

    @property
    def pairs(self) -> tuple[tuple[str, int], ...]:
        """Prompts and seeds in the order they were generated."""
        return tuple((r.prompt, r.seed) for r in self.results if r.recipe == DENSE)

    def result(self, recipe: str, prompt: str, seed: int) -> ClipResult:
        """The clip of a recipe (or ``"dense"``) for one prompt and seed.

        Raises:
            KeyError: there is none.
        """
        for result in self.results:
            if (result.recipe, result.prompt, result.seed) == (recipe, prompt, seed):
                return result
        raise KeyError(f"no clip of {recipe!r} for prompt {prompt!r} and seed {seed}.")

    def summary(self, recipe: str) -> RecipeSummary:
        """One recipe over all clips: means or medians, and how far they scatter."""
        clips = [self.result(recipe, *pair) for pair in self.pairs]
        dense = [self.result(DENSE, *pair) for pair in self.pairs]
        if not clips:
            raise ValueError("a comparison without clips has no summary.")
        metrics: dict[str, Interval] = {}
        missing: dict[str, tuple[str, ...]] = {}
        for name in dict.fromkeys(name for clip in clips for name in clip.metrics):
            measured = [clip.metrics[name] for clip in clips if name in clip.metrics]
            values = [m.value for m in measured if m.value is not None]
            if values:
                metrics[name] = bootstrap_mean(values)
            reasons = tuple(dict.fromkeys(m.reason for m in measured if m.reason is not None))
            if reasons:
                missing[name] = reasons
        attention = _known([clip.attention_seconds for clip in clips])
        dense_attention = _known([clip.attention_seconds for clip in dense])
        ratios = [range_of(dense_attention).median / a for a in attention if dense_attention and a]
        density = _known([clip.density for clip in clips])
        shares = [clip.ran.computed_share for clip in clips if clip.ran is not None]
        return RecipeSummary(
            recipe=recipe,
            clips=len(clips),
            total_seconds=range_of([seconds for clip in clips for seconds in clip.seconds]),
            speedup=speed_up([clip.seconds for clip in dense], [clip.seconds for clip in clips]),
            attention_seconds=range_of(attention) if attention else None,
            attention_speedup=bootstrap_median(ratios) if ratios else None,
            density=bootstrap_mean(density) if density else None,
            metrics=metrics,
            missing=missing,
            stages=_stages([stages for clip in clips for stages in clip.stages]),
            computed_share=range_of(shares) if shares else None,
        )

    def to_json(self) -> dict[str, Any]:
        """JSON-ready tree: the data, and summaries for readers that only want those."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "pipeline": self.pipeline,
            "fps": self.fps,
            "facts": dict(self.facts),
            "notes": list(self.notes),
            "recipes": list(self.recipes),
            "descriptions": dict(self.descriptions),
            "summaries": [summary_to_json(self.summary(name)) for name in (DENSE, *self.recipes)],
            "results": [result_to_json(result) for result in self.results],
        }

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> ComparisonReport:
        """Inverse of :meth:`to_json`; summaries are computed again.

        Raises:
            ValueError: another format or version.
        """
        if (tree.get("format"), tree.get("version")) != (_FORMAT, _VERSION):
            raise ValueError(
                f"expected {_FORMAT} version {_VERSION}, got {tree.get('format')!r} version {tree.get('version')!r}."
            )
        return cls(
            pipeline=tree["pipeline"],
            results=tuple(result_from_json(result) for result in tree["results"]),
            recipes=tuple(tree["recipes"]),
            descriptions=tree["descriptions"],
            fps=tree["fps"],
            facts=tree["facts"],
            notes=tuple(tree["notes"]),
        )


def _stages(runs: Sequence[Stages]) -> dict[str, Interval]:
    names = ("text", "steps", "decode") if runs else ()
    return {name: range_of([getattr(stages, name) for stages in runs]) for name in names}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def result_to_json(result: ClipResult) -> dict[str, Any]:
    """One clip as a JSON-ready tree."""
    metrics: dict[str, dict[str, float | str]] = {}
    for name, measurement in result.metrics.items():
        if measurement.value is not None:
            metrics[name] = {"value": number_to_json(measurement.value)}
        else:
            metrics[name] = {"reason": str(measurement.reason)}
    return {
        "prompt": result.prompt,
        "seed": result.seed,
        "recipe": result.recipe,
        "total_seconds": result.total_seconds,
        "attention_seconds": result.attention_seconds,
        "density": result.density,
        "metrics": metrics,
        "clip": result.clip,
        "runs": list(result.runs),
        "stages": [asdict(stages) for stages in result.stages],
        "ran": None if result.ran is None else result.ran.to_json(),
        "shape": None if result.shape is None else list(result.shape),
    }


def result_from_json(tree: Mapping[str, Any]) -> ClipResult:
    """Inverse of :func:`result_to_json`."""
    metrics = {
        name: Measurement(value=number_from_json(entry["value"]))
        if "value" in entry
        else Measurement(reason=entry["reason"])
        for name, entry in tree["metrics"].items()
    }
    ran = tree.get("ran")
    read = {
        "metrics": metrics,
        "runs": tuple(tree.get("runs", ())),
        "stages": tuple(Stages(**stages) for stages in tree.get("stages", ())),
        "ran": None if ran is None else Ran.from_json(ran),
        "shape": tuple(tree["shape"]) if tree.get("shape") else None,
    }
    return ClipResult(**{**tree, **read})


def _optional(interval: Interval | None) -> dict[str, float | str | int] | None:
    return None if interval is None else interval.to_json()


def summary_to_json(summary: RecipeSummary) -> dict[str, Any]:
    """A recipe's summary as a JSON-ready tree."""
    return {
        "recipe": summary.recipe,
        "clips": summary.clips,
        "total_seconds": summary.total_seconds.to_json(),
        "speedup": summary.speedup.to_json(),
        "attention_seconds": _optional(summary.attention_seconds),
        "attention_speedup": _optional(summary.attention_speedup),
        "density": _optional(summary.density),
        "metrics": {name: interval.to_json() for name, interval in summary.metrics.items()},
        "missing": {name: list(reasons) for name, reasons in summary.missing.items()},
        "stages": {name: interval.to_json() for name, interval in summary.stages.items()},
        "computed_share": _optional(summary.computed_share),
    }
