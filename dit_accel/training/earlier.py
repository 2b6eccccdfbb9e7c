"""What an earlier run left in a folder is set aside, never deleted."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from pathlib import Path


def set_aside(folder: Path, names: Iterable[str]) -> Path | None:
    """Move files and folders of these names from ``folder`` to a new folder in it: ``earlier-1``, ``earlier-2`` ...

    Returns:
        The new folder; None if there was nothing to move.

    Raises:
        ValueError: they cannot be moved.
    """
    found = [folder / name for name in names if (folder / name).exists()]
    if not found:
        return None
    aside = next(path for n in count(1) if not (path := folder / f"earlier-{n}").exists())
    try:
        aside.mkdir()
        for path in found:
            path.rename(aside / path.name)
    except OSError as error:
        raise ValueError(f"Cannot move {found[0]} to {aside}: {error.strerror or error}.") from error
    return aside
