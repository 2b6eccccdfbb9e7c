"""Where a command writes: known, and found fit, before its work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..parts import Parts


def free_name(path: Path, beside: Callable[[Path], Sequence[Path]] = lambda _path: ()) -> Path:
    """A default name that no earlier run has taken: ``path``, or the first of ``path-2``, ``path-3``... that is free.

    Args:
        beside: the other files that are written with one of this name.
    """
    name, number = path, 1
    while any(_taken(one) for one in (name, *beside(name))):
        number += 1
        name = path.with_name(f"{path.stem}-{number}{path.suffix}")
    if name != path:
        print(f"{path} is there already; this run writes {name}.", file=sys.stderr)
    return name


def claimed_folder(
    out: Path | None, default: Path, settings: Mapping[str, Any], count: int, start_over: bool, *records: str
) -> Parts:
    """A folder for so many parts of these settings, claimed: an interrupted run is gone on with.

    Args:
        out: that was asked for. None takes the first of ``default``, ``default-2``... that is free, or that holds some
            of these parts and not all.
        start_over: forget what the folder holds.
        records: further files of settings in it.

    Raises:
        ValueError: see :meth:`dit_accel.parts.Parts.claim`.
    """
    from ..parts import Parts

    if out is None:
        out, number = default, 1
        while _taken(out) and not (Parts(out).is_of(settings) and Parts(out).count() < count):
            number += 1
            out = default.with_name(f"{default.name}-{number}")
        if out != default:
            print(f"{default} is there already; this run writes {out}.", file=sys.stderr)
    parts = Parts(out)
    if start_over:
        parts.forget(*records)
    done = [path for path in (out / "report.json",) if path.exists()] if not parts.count() else None
    parts.claim(settings, None if start_over else done)
    if parts.count():
        print(f"{out} holds {parts.count()} of {count} parts, which are left as they are.", file=sys.stderr)
    return parts


def _taken(path: Path) -> bool:
    """Whether something is there; an empty folder is nothing."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))
