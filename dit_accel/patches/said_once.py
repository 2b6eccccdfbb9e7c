"""Warnings of a model that is patched many times."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from .. import engine


@contextmanager
def said_once() -> Iterator[None]:
    """Let the engine warn once of each thing while the context is open: every run is patched anew."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return text not in said and not said.add(text)  # type: ignore[func-returns-value]

    engine.logger.addFilter(is_new)
    try:
        yield
    finally:
        engine.logger.removeFilter(is_new)
