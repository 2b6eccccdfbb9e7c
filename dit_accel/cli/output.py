"""Where a command writes: known, and found fit, before its work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..parts import Parts


PIPELINE = "pipeline.json"
"""Record of the weights and settings of a pipeline, which are known when it is loaded."""


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
    out: Path | None,
    default: Path,
    settings: Mapping[str, Any],
    unfinished: Callable[[Parts], bool],
    result: str,
    start_over: bool,
) -> Parts:
    """A folder for parts of these settings, claimed: an interrupted run is gone on with.

    Args:
        out: that was asked for. None takes the first of ``default``, ``default-2``... that is free, or that holds an
            unfinished run of the same settings.
        unfinished: whether the run of a folder that is of these settings is.
        result: name of the file that the run writes.
        start_over: forget what the folder holds.

    Raises:
        ValueError: see :meth:`dit_accel.parts.Parts.claim`; a result there that no record goes with is not overwritten.
    """
    from ..parts import Parts

    if out is None:
        out, number = default, 1
        while _taken(out) and not (Parts(out).is_of(settings) and unfinished(Parts(out))):
            number += 1
            out = default.with_name(f"{default.name}-{number}")
        if out != default:
            print(f"{default} is there already; this run writes {out}.", file=sys.stderr)
    parts = Parts(out)
    if start_over:
        parts.forget(PIPELINE)
    there = out / result
    parts.claim(settings, [there] if there.exists() and not (parts.count() or start_over) else None)
    if parts.count():
        print(f"{out} holds {parts.count()} finished parts, which are left as they are.", file=sys.stderr)
    return parts


def _taken(path: Path) -> bool:
    """Whether something is there; an empty folder is nothing."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))
