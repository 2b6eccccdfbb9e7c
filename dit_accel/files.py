"""Files that are checked before the work, and are either written whole or not at all."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def refuse_unwritable(path: Path) -> None:
    """Check that a file can be written at ``path``, before the work whose result it will hold.

    Missing folders are made; nothing else is left behind.

    Raises:
        ValueError: the path is a folder or a device, its name is too long, or its folder cannot be made or written.
    """
    _refuse_other_than_file(path)
    refuse_unwritable_folder(path.parent)


def _refuse_other_than_file(path: Path) -> None:
    try:
        if path.is_dir():
            raise ValueError(f"{path} is a folder; give the name of a file in it.")
        # Moving a file onto /dev/null would replace the device.
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is not a regular file; give the name of one.")
    except OSError as error:
        raise ValueError(f"Cannot write {path}: {error.strerror or error}.") from error


def refuse_unwritable_folder(folder: Path) -> None:
    """Check that files can be written in ``folder``, which is made if it is missing.

    Raises:
        ValueError: the folder is a file, or cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
    except OSError as error:
        raise ValueError(f"Cannot write in {folder}: {error.strerror or error}.") from error


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, with the same suffix; at the end the file there takes the place of ``path``.

    After an exception the temporary file is deleted, and a file that stood at ``path`` before is untouched.

    Raises:
        ValueError: the file cannot be written.
    """
    _refuse_other_than_file(path)
    # Not of the file's own name, which may be as long as names can be.
    draft = path.with_name(f".dit_accel-{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        if not draft.exists():
            raise ValueError(f"Cannot write {path}: nothing was written.")
        os.replace(draft, path)
    except OSError as error:
        raise ValueError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        # Where it was moved, or could not even be made, there is nothing to delete.
        with suppress(OSError):
            draft.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole.

    Raises:
        ValueError: the file cannot be written.
    """
    with written_whole(path) as draft:
        draft.write_text(text, encoding="utf-8")
