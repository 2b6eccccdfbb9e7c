"""How far a long search or calibration is, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """How far it is.

    Attributes:
        done, total: denoising steps of all runs, or runs or forwards of this stage.
        seconds_left: an estimate from the steps so far; None at the beginning.
        stage: what is being done, in words.
    """

    done: int
    total: int
    seconds_left: float | None
    stage: str


@dataclass
class Clock:
    """Steps done, and how long the rest will take."""

    runs: int
    run: int
    progress: Callable[[Progress], None]
    steps: int = 0
    _begin: float = field(default_factory=time.perf_counter)
    _here: int = 0
    _before: int | None = None

    def tick(self, steps: int, stage: str) -> None:
        """After a step of a run of ``steps``."""
        if self._before is None:
            self._before = self.run
        self.steps = steps
        self._here += 1
        spent = time.perf_counter() - self._begin
        total = self.runs * steps
        at = self._before * steps + self._here
        self.progress(Progress(at, total, spent / self._here * (total - at), stage))
