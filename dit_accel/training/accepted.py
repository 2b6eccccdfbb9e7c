"""With which other recipes an adapter may run than the one it was trained with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..recipe import AXES, Recipe

FREE_AXES = ("precision", "schedule", "reuse")
FREE_FIELDS = {"select": ("density", "top_p", "head_densities")}
"""What may differ: in what numbers, how much and when, not which parameters there are or what a block is."""


def other_recipe(trained: Recipe, used: Recipe) -> tuple[str | None, tuple[str, ...]]:
    """Why an adapter cannot run with a recipe, as the end of a sentence, or None; and what differs, a sentence each."""
    refused, sentences = None, []
    for name, before, now in _differences(trained, used):
        axis, _, field = name.partition(".")
        free = axis in FREE_AXES or field in FREE_FIELDS.get(axis, ())
        if not free and refused is None:
            refused = f"{name} is {before!r} there, {now!r} here"
        sentences.append(f"The adapter was trained with {name} = {before!r}, and runs with {now!r}.")
    return refused, tuple(sentences)


def _differences(trained: Recipe, used: Recipe) -> Iterator[tuple[str, Any, Any]]:
    before, now = trained.to_dict(), used.to_dict()
    for axis in AXES:
        if before[axis]["kind"] != now[axis]["kind"]:
            yield axis, before[axis]["kind"], now[axis]["kind"]
            continue
        for field, value in before[axis].items():
            if value != now[axis].get(field):
                yield f"{axis}.{field}", value, now[axis].get(field)
