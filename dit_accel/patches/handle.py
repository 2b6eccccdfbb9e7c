"""The record of a patch: it undoes every mutation, and says what really ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any

from ..call import AttentionCall
from ..engine import OutputTap
from ..presets.spelling import short_line
from ..recipe import Recipe
from ..step_log import StepLog
from .progress import PipelineSchedules
from .session import Session
from .summary import PatchSummary, count_dense, summarise


class PatchHandle:
    """What :func:`dit_accel.patch` returns. Usable as a context manager that removes the patch at its end.

    Attributes:
        recipe: the recipe in force.
        target: the patched pipeline or transformer.
        changes: what else was changed beside attention, a sentence each.
    """

    def __init__(self, target: Any, recipe: Recipe, note: str | None = None) -> None:
        self.target = target
        self.recipe = recipe
        self.note = note
        self.sessions: dict[str, Session] = {}
        self.schedules = PipelineSchedules()
        self.changes: list[str] = []
        self.schedules.add_begun(target)
        self._undo: list[Callable[[], None]] = []

    @property
    def active(self) -> bool:
        """Whether the patch is in place."""
        return bool(self._undo)

    def record(self, undo: Callable[[], None]) -> None:
        """Remember how to undo one mutation."""
        self._undo.append(undo)

    def record_change(self, undo: Callable[[], None], what: str) -> None:
        """Remember how to undo a change beside attention, and what the summary says of it."""
        self.record(undo)
        self.changes.append(what)

    def remove(self) -> None:
        """Undo the patch, last mutation first. Removing twice does nothing."""
        while self._undo:
            self._undo.pop()()
        for session in self.sessions.values():
            session.close()

    def summary(self) -> PatchSummary:
        """What ran so far: calls, true density, time, fallbacks. Waits for the device."""
        return summarise(self.recipe, self.note, self.sessions, tuple(self.changes))

    def record_steps(self, on: bool = True, *, seconds: bool = False) -> None:
        """Keep for :attr:`PatchSummary.steps` what each coming step does; a patch keeps none before it is asked to.

        Args:
            on: False ends it and forgets the steps.
            seconds: also measure each step's forwards, and attention in them. The device is not waited for.
        """
        for session in self.sessions.values():
            session.engine.steps = StepLog(seconds) if on else None

    def reset(self) -> None:
        """Begin the counts, times, notes and steps of :meth:`summary` anew.

        Plans and cached results stay, so that a run which is under way goes on as it would have: the outputs do not
        change. A new run of a pipeline makes its own plans in any case. Of compiled code too, the counts begin anew.
        """
        for session in self.sessions.values():
            session.engine.reset()
            if session.reuse is not None:
                session.reuse.reset()

    def __repr__(self) -> str:
        """What is patched, by which recipe, and how many calls ran; does not wait for the device."""
        records = [record for session in self.sessions.values() for record in session.engine.records]
        sparse, dense = sum(record.sparse_calls for record in records), sum(map(count_dense, records))
        state = "" if self.active else " (removed)"
        return (
            f"<PatchHandle of {type(self.target).__name__}{state}: {short_line(self.recipe)}; {len(records)} layers, "
            f"{sparse} sparse and {dense} dense calls>"
        )

    @contextmanager
    def observe(self, observer: Callable[[str, AttentionCall], None]) -> Iterator[None]:
        """Show every attention call to ``observer(transformer_name, call)`` while the context is open."""
        for name, session in self.sessions.items():
            session.engine.observer = partial(observer, name)
        try:
            yield
        finally:
            for session in self.sessions.values():
                session.engine.observer = None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model's own attention, uncounted, while the context is open: the dense model from the same
        weights, without a second copy of them."""
        engines = [session.engine for session in self.sessions.values()]
        before = [engine.switched_on for engine in engines]
        for engine in engines:
            engine.switched_on = False
        try:
            yield
        finally:
            for engine, was_on in zip(engines, before, strict=True):
                engine.switched_on = was_on

    @contextmanager
    def tap_outputs(self, tap: OutputTap) -> Iterator[None]:
        """Give every attention output (B, S, H, D) to ``tap(layer, output, dense)``, and go on with what it
        returns. ``dense`` computes the model's own attention of the call; it is None where ``output`` is that
        already. Compiled code takes no gradients from what a tap keeps."""
        engines = [session.engine for session in self.sessions.values()]
        for engine in engines:
            engine.output_tap = tap
        try:
            yield
        finally:
            for engine in engines:
                engine.output_tap = None

    def set_density(self, density: float | None) -> None:
        """Select with another density from the next plan on; None returns to the recipe's own.

        Raises:
            ValueError: a recipe whose selection has no density, or a density outside (0, 1].
        """
        if density is not None and self.recipe.select.density is None:
            raise ValueError(f"{type(self.recipe.select).__name__} has no density to set, got {density}.")
        if density is not None and not 0.0 < density <= 1.0:
            raise ValueError(f"density must lie in (0, 1], got {density}.")
        for session in self.sessions.values():
            session.engine.planner.density = density

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
