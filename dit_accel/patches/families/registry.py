"""Families that others declare: by a call, or by an entry point of an installed package."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from .family import Family

ENTRY_POINTS = "dit_accel.families"
_declared: list[Family] = []


def register_family(family: Family) -> None:
    """Make :func:`dit_accel.patch` know a transformer. A class that this package knows is then read as ``family`` says.

    An installed package does the same without a call, by an entry point of the group ``dit_accel.families`` that is a
    :class:`Family`.

    Raises:
        TypeError: it is no family.
        ValueError: another family that was registered names the same class.
    """
    if not isinstance(family, Family):
        raise TypeError(f"register_family takes a Family, got {type(family).__name__}.")
    for other in _declared:
        both = set(other.transformers) & set(family.transformers)
        if both and other != family:
            raise ValueError(f"{min(both)} is of the registered family {other.name!r} already, got {family.name!r}.")
    if family not in _declared:
        _declared.append(family)


def registered() -> tuple[Family, ...]:
    """Families of others, those declared by a call first."""
    return (*_declared, *_of_entry_points())


@cache
def _of_entry_points() -> tuple[Family, ...]:
    found = []
    for entry in entry_points(group=ENTRY_POINTS):
        family = entry.load()
        if not isinstance(family, Family):
            kind = type(family).__name__
            raise TypeError(f"The entry point {entry.name!r} of {ENTRY_POINTS} must be a Family, got {kind}.")
        found.append(family)
    return tuple(found)
