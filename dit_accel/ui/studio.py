"""One pipeline that several visitors use in turn: jobs, their progress, and their end. Knows nothing of a page."""

from __future__ import annotations

import itertools
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..api import patch
from ..patches.steps_svg import plan_over_steps
from ..patches.summary import PatchSummary
from ..pipelines.generate import Generated, generate, save
from ..pipelines.unknown_words import note_on, unknown_words
from ..quality.pixel import Psnr
from ..quality.video import ClipPair
from .wanted import Form, Wanted

# Dense results that wait for another recipe.
KEPT_DENSE = 4
# What a visitor can cause; anything else is a fault of the program and shows in the terminal.
EXPECTED = (ValueError, TypeError, RuntimeError, OSError, ImportError, MemoryError, ArithmeticError)


class Cancelled(Exception):
    """A visitor does not want the job any longer."""


@dataclass(frozen=True)
class Shown:
    """What a job shows at a moment.

    Attributes:
        status: one sentence.
        share: done part of the job, 0 to 1; None where nothing runs.
        failed: the sentence says what is wrong.
        dense, fast: files of the results so far.
        verdict: times, and how near the two are.
        summary: what really ran.
        picture: the plan over the steps, as SVG; empty where none is known.
    """

    status: str
    share: float | None = None
    failed: bool = False
    dense: Path | None = None
    fast: Path | None = None
    verdict: str = ""
    summary: str = ""
    picture: str = ""


class Studio:
    """Runs jobs on one pipeline, one after the other, each in a thread of its own.

    Args:
        pipe: a diffusers pipeline; nothing else may use it.
        folder: where results are written.
    """

    def __init__(self, pipe: Any, folder: Path) -> None:
        self.pipe = pipe
        self._folder = folder
        self._numbers = itertools.count()
        self._dense: OrderedDict[tuple[Any, ...], tuple[Generated, Path]] = OrderedDict()
        self._stops: dict[str, threading.Event] = {}
        self._busy = threading.Lock()

    def run(self, form: Form, job: str) -> Iterator[Shown]:
        """Run a job, and give what it shows after each step. Ending the iteration early cancels it.

        Args:
            job: whose it is, for :meth:`cancel`.
        """
        stop: threading.Event = threading.Event()
        self._stops[job] = stop
        shown: queue.Queue[Shown | BaseException | None] = queue.Queue()
        threading.Thread(target=self._work, args=(form, stop, shown.put), daemon=True).start()
        try:
            while (one := shown.get()) is not None:
                if isinstance(one, BaseException):
                    raise one
                yield one
        finally:
            stop.set()
            if self._stops.get(job) is stop:
                del self._stops[job]

    def cancel(self, job: str) -> bool:
        """End a job at its next step; whether there was one."""
        stop = self._stops.get(job)
        if stop is not None:
            stop.set()
        return stop is not None

    def _work(self, form: Form, stop: threading.Event, put: Callable[[Shown | BaseException | None], None]) -> None:
        try:
            self._run(form, stop, put)
        except Cancelled:
            put(Shown("Cancelled."))
        except EXPECTED as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            put(Shown(f"Error: {lines[0]}", failed=True))
        except BaseException as error:
            put(error)
        finally:
            put(None)

    def _run(self, form: Form, stop: threading.Event, put: Callable[[Shown], None]) -> None:
        wanted = Wanted.read(form, self.pipe)
        if not self._busy.acquire(blocking=False):
            put(Shown("Waiting for the run of another visitor.", 0.0))
            while not self._busy.acquire(timeout=0.1):
                if stop.is_set():
                    raise Cancelled
        try:
            sides = 1 + (wanted.with_dense and wanted.dense_key not in self._dense)
            known = Shown("", 0.0)
            kept: tuple[Generated, Path] | None = None
            if wanted.with_dense:
                kept = self._dense.get(wanted.dense_key)
                if kept is None:
                    kept = self._keep(wanted, self._side("dense", wanted, stop, put, known, 0, sides))
                known = replace(known, dense=kept[1])
            with patch(self.pipe, wanted.recipe) as handle:
                handle.record_steps(seconds=True)
                fast, file = self._side("accelerated", wanted, stop, put, known, sides - 1, sides)
                summary = handle.summary()
        finally:
            self._busy.release()
        verdict = _verdict(fast, None if kept is None else kept[0])
        put(
            Shown(
                "Done.",
                None,
                dense=known.dense,
                fast=file,
                verdict=" ".join(filter(None, (verdict, note_on(unknown_words(self.pipe, wanted.prompt))))),
                summary=str(summary),
                picture=_picture(summary),
            )
        )

    def _keep(self, wanted: Wanted, made: tuple[Generated, Path]) -> tuple[Generated, Path]:
        self._dense[wanted.dense_key] = made
        while len(self._dense) > KEPT_DENSE:
            self._dense.popitem(last=False)
        return made

    def _side(
        self,
        name: str,
        wanted: Wanted,
        stop: threading.Event,
        put: Callable[[Shown], None],
        known: Shown,
        before: int,
        sides: int,
    ) -> tuple[Generated, Path]:
        """One run of the pipeline, and the file of what it made."""

        def after_step(done: int, total: int) -> None:
            if stop.is_set():
                raise Cancelled
            status, share = f"Running {name}: step {done} of {total}.", (before + done / total) / sides
            put(replace(known, status=status, share=share))

        if stop.is_set():
            raise Cancelled
        put(replace(known, status=f"Running {name}.", share=before / sides))
        settings: dict[str, Any] = dict(wanted.settings)
        made = generate(self.pipe, wanted.prompt, **settings, seed=wanted.seed, progress=after_step)
        return made, save(made, self._folder / f"{next(self._numbers)}-{name}")


def _verdict(fast: Generated, dense: Generated | None) -> str:
    if dense is None:
        return f"Accelerated: {fast.seconds:.1f} s."
    psnr = Psnr()(ClipPair(dense.frames, fast.frames, dense.fps))  # type: ignore[arg-type]
    near = "identical" if psnr == float("inf") else f"a PSNR of {psnr:.1f} dB"
    return (
        f"Dense: {dense.seconds:.1f} s. Accelerated: {fast.seconds:.1f} s. Ratio: {dense.seconds / fast.seconds:.2f}. "
        f"Between the two: {near}. One run of each, without a warm-up."
    )


def _picture(summary: PatchSummary) -> str:
    """Of the transformer with the most steps."""
    names = [step.transformer for step in summary.steps]
    if not names:
        return ""
    longest = max(dict.fromkeys(names), key=names.count)
    return plan_over_steps([step for step in summary.steps if step.transformer == longest])
