"""What CUDA graphs read of runs and layouts, which forget it earlier."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

Held = dict[int, Any]
"""By id."""


class _Thread(threading.local):
    held: Held | None = None


class GraphHold:
    """Keeps what is captured for as long as the patch, since nobody tells when somebody's graph is gone; where the one
    who captures says so, in his keeping."""

    def __init__(self) -> None:
        self._for_good: Held = {}
        self._thread = _Thread()

    def add(self, read: Iterable[Any]) -> None:
        """Keep what a captured call reads."""
        held = self._for_good if self._thread.held is None else self._thread.held
        held.update({id(one): one for one in read})

    @contextmanager
    def instead(self, held: Held) -> Iterator[None]:
        """Put what this thread captures meanwhile there, and nowhere else."""
        before, self._thread.held = self._thread.held, held
        try:
            yield
        finally:
            self._thread.held = before

    def clear(self) -> None:
        """Drop all that is kept as long as the patch."""
        self._for_good.clear()
