"""The command line, ``dit-accel``: one command a file."""

from __future__ import annotations

import sys

# What the extra `cli` brings, as Python imports it.
_NEEDED = frozenset(("typer", "rich"))


def run() -> None:
    """Run the command line, or say what it needs."""
    try:
        from .main import app
    except ModuleNotFoundError as error:
        if error.name not in _NEEDED:
            raise
        print(
            f"Error: dit-accel needs {error.name} for its command line: pip install 'dit-accel[cli]'.", file=sys.stderr
        )
        sys.exit(2)
    app()
