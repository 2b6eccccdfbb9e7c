"""What docs/cli.md says that a command's JSON holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
# Flags with which a command prints something else.
_OTHERS = {
    "--compare-dense": "--compare-dense",
    "--prompts": "--prompts",
    "--prompts-file": "--prompts",
    "--pipeline": "--pipeline",
    "--context-parallel": "--context-parallel",
    "--rules": "--rules",
}


def documented_keys(arguments: Sequence[str]) -> list[str]:
    """The keys for a call of the command line."""
    command = arguments[0]
    flags = [_OTHERS[one] for one in arguments if one in _OTHERS] if command in ("generate", "bench", "search") else []
    # Of generate `--pipeline` is another pipeline, which prints the same.
    flags = [flag for flag in flags if (command, flag) != ("generate", "--pipeline")]
    rows = dict(
        re.findall(r"^\| `([^`]+)` \| (.*) \|$", PAGE.read_text(encoding="utf-8").split("## JSON")[1], re.MULTILINE)
    )
    row = rows[" ".join((command, *flags))]
    keys = re.findall(r"`(\w+)`", row)
    return [*documented_keys([command]), *keys] if row.startswith("those, and") else keys
