"""Where a command writes: known, and found fit, before its work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path


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


def _taken(path: Path) -> bool:
    """Whether something is there; an empty folder is nothing."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))
