"""The record of a patch: it undoes every mutation, and says what really ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any

from ..call import AttentionCall
from ..engine import OutputTap
from ..recipe import Recipe
from .progress import PipelineSchedules
from .session import Session
from .summary import PatchSummary, summarise


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
