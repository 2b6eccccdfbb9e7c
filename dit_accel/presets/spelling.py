"""A recipe as one short line, which the command line reads back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from ..recipe import AXES, Recipe, name_of_kind
from ..stages.reuse.none import NoReuse
from . import NAMES, PRESETS

# Tables of many heads or steps: their size says enough.
LONGEST_VALUE = 40


def short_line(recipe: Recipe) -> str:
    """The nearest preset and what differs from it, such as ``pooled; select.density=0.1``.

    Values that are long are left out: their number of entries stands in. Without any, ``--recipe`` reads the line.
    """
    found: tuple[int, str] | None = None
    for name, preset in NAMES.at_hand().items():
        try:
            base = preset()
        except Exception:
            if name in PRESETS:
                raise
            continue  # somebody's preset must not break what is only shown
        if isinstance(recipe.reuse, NoReuse) and not isinstance(base.reuse, NoReuse):
            continue  # a profile is a whole run, and names none that computes every step
        changes = list(_changes(base, recipe))
        if found is None or len(changes) < found[0]:
            found = len(changes), "; ".join((name, *changes))
    assert found is not None
    return found[1]


def _changes(base: Recipe, recipe: Recipe) -> Iterator[str]:
    for axis in AXES:
        before, stage = getattr(base, axis), getattr(recipe, axis)
        if type(before) is not type(stage):
            yield f"{axis}={name_of_kind(axis, type(stage)) or type(stage).__name__}"
            before = type(stage)()
        for one in fields(stage):
            value = getattr(stage, one.name)
            if value != getattr(before, one.name):
                yield f"{axis}.{one.name}={_spelled(value)}"


def _spelled(value: Any) -> str:
    # As --set takes it: text without quotes.
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= LONGEST_VALUE or not isinstance(value, tuple) else f"<{len(value)} entries>"
