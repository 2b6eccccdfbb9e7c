"""Stages and presets from outside this package get names that recipes know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from . import presets
from .names import Names
from .recipe import NAMES, PROTOCOLS

ThingT = TypeVar("ThingT")


def register(name: str) -> Callable[[ThingT], ThingT]:
    """A decorator that gives a class or function a name, for recipes, their files, and the command line.

    A class is a kind on the axis whose protocol it inherits from: ``Order``, ``Select``, ``Compensation``,
    ``Precision`` or ``Reuse``, each in ``dit_accel.stages``. It is a frozen dataclass whose fields have defaults. A
    function that returns a :class:`~dit_accel.Recipe`, and whose options have defaults, is a preset.

    >>> @dit_accel.register("own_block")  # doctest: +SKIP
    ... @dataclass(frozen=True)
    ... class OwnBlock(Select): ...
    >>> dit_accel.patch(pipe, dit_accel.Recipe().with_fields({"select": "own_block"}))  # doctest: +SKIP

    An installed package does the same without a call, by entry points of the groups ``dit_accel.presets``,
    ``dit_accel.orders``, ``dit_accel.selections``, ``dit_accel.compensations``, ``dit_accel.precisions`` and
    ``dit_accel.reuses``. Who runs a recipe imports the module first, on the command line by ``--import MODULE``.

    Raises:
        TypeError: it is neither, or a field or option has no default.
        ValueError: the name is taken, or is no name.
    """
    if not isinstance(name, str):
        raise TypeError(f"register takes a name, as in @dit_accel.register('mine'), got {name!r}.")

    def give_name(thing: ThingT) -> ThingT:
        _names_for(thing).register(name, thing)
        return thing

    return give_name


def unregister(name: str, thing: object) -> None:
    """Take a name back that :func:`register` gave to this class or function.

    Raises:
        TypeError: it is nothing that can have a name.
        ValueError: it does not have this name.
    """
    names = _names_for(thing)
    if names.at_hand().get(name) is not thing:
        raise ValueError(f"{getattr(thing, '__name__', thing)} is not the {names.what} {name!r}.")
    names.unregister(name)


def _names_for(thing: object) -> Names[Any]:
    """The name space that a class or function belongs to."""
    if not isinstance(thing, type):
        return presets.NAMES
    for axis, protocol in PROTOCOLS.items():
        if protocol in thing.__mro__:
            return NAMES[axis]
    allowed = ", ".join(protocol.__name__ for protocol in PROTOCOLS.values())
    raise TypeError(f"A class with a name must inherit from one of {allowed}, got {thing.__name__}.")
