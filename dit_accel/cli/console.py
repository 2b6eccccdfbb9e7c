"""Text on the screen as it is."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console


def plain_console(*, stderr: bool = False) -> Console:
    """A console that takes square brackets and words between colons for text, not for styles and pictures."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


class _OnStderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


@contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """What the library warns of, as lines on stderr, while a command runs."""
    logger, handler = logging.getLogger("dit_accel"), _OnStderr(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def speak_utf8() -> None:
    """Write UTF-8 whatever the locale says: a prompt in any script can be printed, and a path as it is."""
    for stream in (sys.stdout, sys.stderr):
        _make_utf8(stream)


def _make_utf8(stream: TextIO) -> None:
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(encoding="utf-8", errors="surrogateescape")
