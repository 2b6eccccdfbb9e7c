"""What a user sees when something is wrong: one sentence and exit code 2."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Collection
from typing import Any

import typer

from .console import warnings_on_stderr

# How the library says what to change in a call of Python.
_KEYWORD = re.compile(r"\b(?P<verb>pass|patch with|give|set) (?P<name>[a-z_]+) ?= ?(?P<value>True|False|'[^']*'|\d+)")


def _in_flags(sentence: str, options: Collection[str]) -> str:
    """A sentence of the library with the command's own flags in place of Python's keywords, as far as it has them."""

    def flag(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        if name not in options:
            return found[0]
        spelled = name.replace("_", "-")
        if value in ("True", "False"):
            return f"give --{spelled if value == 'True' else f'no-{spelled}'}"
        return f"give --{spelled} {value.strip(chr(39))}"

    return _KEYWORD.sub(flag, sentence)


def one_sentence_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the errors that a user can cause into a line on stderr; with ``--debug`` the traceback shows."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with warnings_on_stderr():
                command(*args, **kwargs)
        except typer.Exit:
            raise
        except (ValueError, TypeError, RuntimeError, OSError, ImportError, MemoryError, ArithmeticError) as error:
            if kwargs.get("debug"):
                raise
            # Libraries wrap their messages over many lines; the first says what is wrong.
            lines = str(error).strip().splitlines() or [type(error).__name__]
            print(f"Error: {_in_flags(lines[0], kwargs)}", file=sys.stderr)
            raise typer.Exit(2) from error

    return run
