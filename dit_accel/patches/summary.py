"""What a patch really did, as data and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from textwrap import fill
from typing import TYPE_CHECKING, Any, Protocol

from ..presets.spelling import short_line
from ..recipe import Recipe
from ..records import BackendsUsed, LayerRecord, SharedWork, backend_lines
from .reasons import CACHED, PASSED
from .step_summary import StepSummary, line_of_steps, summarise_steps
from .summary_html import as_html

if TYPE_CHECKING:
    from ..engine import Engine
    from .reuse.tracker import ReuseTracker

# Of a terminal.
COLUMNS = 80


@dataclass(frozen=True)
class LayerSummary:
    """One self-attention layer.

    Attributes:
        name: module path, below the transformer's name if there are several.
        sparse_calls, plans_made: counts.
        dense_calls: count by reason.
        density: mean kept share of block pairs over the sparse calls; None without any.
        cached_calls: calls of the module that a cache of diffusers answered.
        nan_calls: sparse calls whose output held a NaN.
        token_density: the same of pairs of tokens: less than the density where a window ends inside of blocks.
        replayed_calls: sparse calls that CUDA graphs computed, which no time of attention holds.
    """

    name: str
    sparse_calls: int
    dense_calls: dict[str, int]
    plans_made: int
    density: float | None
    nan_calls: int
    cached_calls: int = 0
    token_density: float | None = None
    replayed_calls: int = 0


@dataclass(frozen=True)
class PatchSummary:
    """A patch as a whole.

    Attributes:
        recipe: the recipe's text.
        note: why a recipe was chosen or left dense, where that was automatic.
        notes: what else a user should know, a sentence each.
        layers: per layer.
        backends: by operation ("attention", "selection", "block_mass", ...) the backends that ran it, each with the
            reason for it. An operation that did not run is not there.
        plan_seconds, sparse_seconds, dense_seconds: time spent planning, in sparse and in dense attention.
        computed_forwards, skipped_forwards: of recipes with reuse, the transformers' forwards that ran all blocks, and
            those that took an earlier one's result for some; 0 without reuse.
        parallel: how processes shared the calls, a sentence each; all counts are this process' own.
        rank_densities: of such calls, the density of each process; empty where they are not known to all.
        imbalance: kept block pairs of the busiest of them over the mean of all; None where none was shared.
        changes: what :func:`~dit_accel.accelerate` changed beside attention, a sentence each.
        short_recipe: the nearest preset, and what differs from it.
        left_alone: other attention modules, which run as the model has them: to a prompt, in windows, over text or
            sound, linear. A number in a path is *.
        steps: what each step did, in order; empty without :meth:`~dit_accel.PatchHandle.record_steps`.
    """

    recipe: str
    note: str | None
    notes: tuple[str, ...]
    layers: tuple[LayerSummary, ...]
    backends: dict[str, dict[str, str]]
    plan_seconds: float
    sparse_seconds: float
    dense_seconds: float
    computed_forwards: int = 0
    skipped_forwards: int = 0
    changes: tuple[str, ...] = ()
    short_recipe: str = ""
    parallel: tuple[str, ...] = ()
    left_alone: tuple[str, ...] = ()
    rank_densities: tuple[float, ...] = ()
    imbalance: float | None = None
    steps: tuple[StepSummary, ...] = ()

    @property
    def computed_share(self) -> float | None:
        """Share of the forwards that ran all blocks; None for a recipe without reuse, or without any forward."""
        forwards = self.computed_forwards + self.skipped_forwards
        return self.computed_forwards / forwards if forwards else None

    @property
    def sparse_calls(self) -> int:
        return sum(layer.sparse_calls for layer in self.layers)

    @property
    def dense_calls(self) -> dict[str, int]:
        """Dense calls of all layers, by reason."""
        total: Counter[str] = Counter()
        for layer in self.layers:
            total.update(layer.dense_calls)
        return dict(total)

    @property
    def cached_calls(self) -> int:
        """Calls that a cache of diffusers answered, in all layers: neither sparse nor dense."""
        return sum(layer.cached_calls for layer in self.layers)

    @property
    def replayed_calls(self) -> int:
        """Sparse calls that CUDA graphs computed, in all layers."""
        return sum(layer.replayed_calls for layer in self.layers)

    @property
    def nan_calls(self) -> int:
        return sum(layer.nan_calls for layer in self.layers)

    @property
    def density(self) -> float | None:
        """Mean kept share of block pairs over all sparse calls; None without any."""
        calls = self.sparse_calls
        if not calls:
            return None
        return sum((layer.density or 0.0) * layer.sparse_calls for layer in self.layers) / calls

    @property
    def token_density(self) -> float | None:
        """Mean seen share of token pairs over all sparse calls; None without any."""
        calls = self.sparse_calls
        if not calls:
            return None
        return sum((layer.token_density or 0.0) * layer.sparse_calls for layer in self.layers) / calls

    @property
    def mean_density(self) -> float | None:
        """The same over all calls, dense ones counted as 1; None without any call."""
        dense = sum(self.dense_calls.values())
        calls = self.sparse_calls + dense
        return None if not calls else ((self.density or 0.0) * self.sparse_calls + dense) / calls

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {
            "sparse_calls": self.sparse_calls,
            "dense_calls": self.dense_calls,
            "cached_calls": self.cached_calls,
            "replayed_calls": self.replayed_calls,
            "nan_calls": self.nan_calls,
            "density": self.density,
            "token_density": self.token_density,
            "mean_density": self.mean_density,
            "computed_share": self.computed_share,
        }

    def __repr__(self) -> str:
        """One line; ``str`` has what a user reads, :meth:`to_dict` all."""
        density = "" if self.density is None else f" at density {self.density:.3f}"
        return (
            f"<PatchSummary of {self.short_recipe or self.recipe}: {len(self.layers)} layers, "
            f"{self.sparse_calls} sparse calls{density}, {sum(self.dense_calls.values())} dense>"
        )

    def __str__(self) -> str:
        """:meth:`lines`, wrapped at :data:`COLUMNS`."""
        return "\n".join(_wrapped(line) for line in self.lines())

    def _repr_html_(self) -> str:
        return as_html(self)

    def lines(self) -> list[str]:
        """What a user reads: the recipe in short, what he should know, then what ran."""
        lines = [f"recipe: {self.short_recipe or self.recipe}"]
        if self.note:
            lines.append(f"note: {self.note}")
        lines += [f"note: {note}" for note in self.notes]
        if self.computed_share is not None:
            lines.append(f"forwards: {self.computed_forwards} computed, {self.skipped_forwards} skipped")
        lines += self.changes
        lines += self.parallel
        density = "-" if self.density is None else f"{self.density:.3f}"
        seen = ""
        if self.density is not None and self.token_density is not None and self.token_density < 0.99 * self.density:
            seen = f", of which token masks show {self.token_density / self.density:.3f}"
        lines.append(f"attention: {self.sparse_calls} sparse calls at density {density}{seen}")
        if self.imbalance is not None:
            each = ", ".join(f"{density:.3f}" for density in self.rank_densities)
            lines.append(f"  by rank: density {each}; the busiest has {self.imbalance:.2f} times the mean work")
        lines += [f"  dense calls: {count} ({reason})" for reason, count in self.dense_calls.items()]
        if self.cached_calls:
            lines.append(f"  answered by a cache: {self.cached_calls}")
        if self.replayed_calls:
            lines.append(f"  replayed as CUDA graphs: {self.replayed_calls} sparse calls, which these times leave out")
        if self.left_alone:
            lines.append(f"  left alone: {', '.join(self.left_alone)}")
        lines += [f"  {line}" for line in backend_lines(self.backends)]
        lines.append(
            f"  time: {self.sparse_seconds:.3f} s sparse, {self.dense_seconds:.3f} s dense, "
            f"{self.plan_seconds:.3f} s planning ({sum(layer.plans_made for layer in self.layers)} plans)"
        )
        if self.steps:
            lines.append(f"  {line_of_steps(self.steps)}")
        if self.nan_calls:
            lines.append(f"  warning: {self.nan_calls} calls gave NaN")
        return lines


def _wrapped(line: str) -> str:
    """Lines that go on are indented deeper; a word, a path or a setting is never broken."""
    indent = " " * (len(line) - len(line.lstrip()))
    after = f"{indent}    "
    return fill(line, COLUMNS, subsequent_indent=after, break_long_words=False, break_on_hyphens=False)


class Recorded(Protocol):
    """What holds the records of one transformer."""

    @property
    def engine(self) -> Engine: ...

    @property
    def reuse(self) -> ReuseTracker | None: ...


def summarise(
    recipe: Recipe, note: str | None, sessions: Mapping[str, Recorded], changes: tuple[str, ...] = ()
) -> PatchSummary:
    """Read the records of a patch's engines, by transformer name."""
    engines = {name: session.engine for name, session in sessions.items()}
    reused = [session.reuse for session in sessions.values() if session.reuse is not None]
    layers: list[LayerSummary] = []
    left_alone: list[str] = []
    steps: list[StepSummary] = []
    backends = BackendsUsed()
    plan = sparse = dense = 0.0
    for name, engine in engines.items():
        prefix = f"{name}." if len(engines) > 1 else ""
        layers += [_layer(prefix, record) for record in engine.records]
        left_alone += [f"{prefix}{path}" for path in engine.left_alone]
        steps += summarise_steps(engine.steps, name if len(engines) > 1 else "")
        backends.update(engine.backends_used)
        plan += engine.plan_time.seconds()
        sparse += engine.sparse_time.seconds()
        dense += engine.dense_time.seconds()
    shared = SharedWork()
    for engine in engines.values():
        shared.update(engine.shared)
    notes = dict.fromkeys(note for engine in engines.values() for note in engine.notes)
    summary = PatchSummary(
        recipe=repr(recipe),
        short_recipe=short_line(recipe),
        note=note,
        notes=tuple(notes),
        layers=tuple(layers),
        backends=backends.to_dict(),
        plan_seconds=plan,
        sparse_seconds=sparse,
        dense_seconds=dense,
        computed_forwards=sum(one.computed for one in reused),
        skipped_forwards=sum(one.skipped for one in reused),
        changes=changes,
        parallel=tuple(dict.fromkeys(one for engine in engines.values() for one in engine.parallel)),
        left_alone=tuple(left_alone),
        rank_densities=shared.densities(),
        imbalance=shared.imbalance(),
        steps=tuple(steps),
    )
    raised = _why_denser(recipe, summary.density)
    return summary if raised is None else replace(summary, notes=(*notes, raised))


def _why_denser(recipe: Recipe, ran: float | None) -> str | None:
    """What to say where more ran than was asked for; None where about as much did."""
    asked = recipe.select.density
    if ran is None or asked is None or recipe.schedule.density_points or ran <= 1.1 * asked + 0.01:
        return None
    return (
        f"Density {asked:g} was asked for and {ran:.3f} ran: a query block reads at least its own block, whole blocks "
        "only, and every block that holds text or references."
    )


def dense_calls(record: LayerRecord) -> Counter[str]:
    """Calls of a layer that were not sparse, by reason, also those that compiled code counted."""
    found = Counter(record.dense_calls)
    if record.compiled_dense is not None:
        counted = zip(PASSED, record.compiled_dense.tolist(), strict=True)
        found.update({reason: count for reason, count in counted if count})
    return found


def count_dense(record: LayerRecord) -> int:
    """Dense calls of a layer, without those that a cache answered."""
    return sum(count for reason, count in dense_calls(record).items() if reason != CACHED)


def _layer(prefix: str, record: LayerRecord) -> LayerSummary:
    dense = dense_calls(record)
    cached = dense.pop(CACHED, 0)
    return LayerSummary(
        name=prefix + record.name,
        sparse_calls=record.sparse_calls,
        dense_calls=dict(dense),
        plans_made=record.plans_made,
        density=record.density_sum / record.sparse_calls if record.sparse_calls else None,
        token_density=record.seen_sum / record.sparse_calls if record.sparse_calls else None,
        nan_calls=record.nan_calls,
        cached_calls=cached,
        replayed_calls=record.replayed_calls,
    )
