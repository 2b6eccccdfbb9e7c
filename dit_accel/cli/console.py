"""Text on the screen as it is."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console


def plain_console(*, stderr: bool = False) -> Console:
    """A console that takes square brackets and words between colons for text, not for styles and pictures."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def speak_utf8() -> None:
    """Write UTF-8 whatever the locale says: a prompt in any script can be printed, and a path as it is."""
    for stream in (sys.stdout, sys.stderr):
        _make_utf8(stream)


def _make_utf8(stream: TextIO) -> None:
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(encoding="utf-8", errors="surrogateescape")
