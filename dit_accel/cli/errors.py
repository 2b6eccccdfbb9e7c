"""What a user sees when something is wrong: one sentence and exit code 2."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import typer


def one_sentence_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the errors that a user can cause into a line on stderr; with ``--debug`` the traceback shows."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except typer.Exit:
            raise
        except (ValueError, TypeError, RuntimeError, OSError, ImportError, MemoryError, ArithmeticError) as error:
            if kwargs.get("debug"):
                raise
            # Libraries wrap their messages over many lines; the first says what is wrong.
            lines = str(error).strip().splitlines() or [type(error).__name__]
            print(f"Error: {lines[0]}", file=sys.stderr)
            raise typer.Exit(2) from error

    return run
