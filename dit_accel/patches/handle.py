"""The record of a patch: it undoes every mutation, and says what really ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any

from ..engine import AttentionCall
from ..recipe import Recipe
from .session import Session
from .summary import PatchSummary, summarise


class PatchHandle:
    """What :func:`dit_accel.patch` returns. Usable as a context manager that removes the patch at its end.

    Attributes:
        recipe: the recipe in force.
        target: the patched pipeline or transformer.
    """

    def __init__(self, target: Any, recipe: Recipe, note: str | None = None) -> None:
        self.target = target
        self.recipe = recipe
        self.note = note
        self.sessions: dict[str, Session] = {}
        self._undo: list[Callable[[], None]] = []

    @property
    def active(self) -> bool:
        """Whether the patch is in place."""
        return bool(self._undo)

    def record(self, undo: Callable[[], None]) -> None:
        """Remember how to undo one mutation."""
        self._undo.append(undo)

    def remove(self) -> None:
        """Undo the patch, last mutation first. Removing twice does nothing."""
        while self._undo:
            self._undo.pop()()
        for session in self.sessions.values():
            session.engine.forget()

    def summary(self) -> PatchSummary:
        """What ran so far: calls, true density, time, fallbacks. Waits for the device."""
        return summarise(self.recipe, self.note, {name: s.engine for name, s in self.sessions.items()})

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

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
