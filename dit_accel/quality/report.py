"""Writing a comparison to a folder: JSON, a page, and a side-by-side film."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_text
from .clips import read_clip, save_clip, save_film, side_by_side
from .page import report_page
from .results import DENSE, ComparisonReport

REPORT = "report.json"


@dataclass(frozen=True)
class ReportFiles:
    """Where a report was written; ``film`` is None when no clips were saved, a PNG for images."""

    json: Path
    page: Path
    film: Path | None


def write_report(report: ComparisonReport, folder: Path) -> ReportFiles:
    """Write ``report.json``, ``index.html`` and ``side_by_side.mp4`` (``.png`` for images) to ``folder``.

    The clips named in the report must lie under ``folder``. The film shows one prompt after the other: dense
    first, then every recipe, under labels.

    Raises:
        ValueError: a file cannot be written; the message names it.
    """
    json_path = write_json(report, folder)
    page_path = folder / "index.html"
    write_text(page_path, report_page(report, folder))
    return ReportFiles(json_path, page_path, _write_film(report, folder))


def write_json(report: ComparisonReport, folder: Path) -> Path:
    """Write ``report.json`` alone, which takes no time."""
    path = folder / REPORT
    write_text(path, json.dumps(report.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def read_report(path: Path) -> ComparisonReport:
    """Read a ``report.json``.

    Raises:
        ValueError: not such a file; the message names it.
    """
    try:
        return ComparisonReport.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is not a comparison report: {error}") from error


def _write_film(report: ComparisonReport, folder: Path) -> Path | None:
    names = (DENSE, *report.recipes)
    rows = [
        (prompt, paths)
        for prompt, seed in report.pairs
        if all(paths := [report.result(name, prompt, seed).clip for name in names])
    ]
    if not rows:
        return None
    labels = [name if name == DENSE else f"{name}  {report.summary(name).speedup.median:.2f}x" for name in names]

    def pictures() -> Iterator[np.ndarray[Any, Any]]:
        size: tuple[int, ...] | None = None
        for prompt, paths in rows:
            row = side_by_side([read_clip(folder / str(p)) for p in paths], labels, prompt).numpy()
            size = size or row.shape[1:]
            yield from _fit(row, size)

    if str(rows[0][1][0]).endswith(".png"):
        path = save_clip(np.concatenate(list(pictures()), axis=0)[None], folder / "side_by_side", report.fps)
        return path
    path = folder / "side_by_side.mp4"
    save_film(pictures(), path, report.fps)
    return path


def _fit(film: np.ndarray[Any, Any], size: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Cut or pad a film's height (captions may need one line or two) to the first one's."""
    height = size[0]
    missing = height - film.shape[1]
    if missing > 0:
        film = np.pad(film, ((0, 0), (0, missing), (0, 0), (0, 0)), mode="edge")
    return film[:, :height]
