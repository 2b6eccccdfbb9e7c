"""Names that recipes know things by: this package's, those that others register, and those of entry points."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

logger = logging.getLogger("dit_accel")

ThingT = TypeVar("ThingT")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")


def home_of(thing: object) -> str | None:
    """The module that defines a class or function of others; None for this package's own."""
    module = str(getattr(thing, "__module__", None) or "__main__")
    return None if _package(module) == _package(__name__) else module


class MissingName(ValueError):
    """A file is whole, and names something that a module brings which is not imported."""


class Names(Generic[ThingT]):
    """One name space, such as the selections.

    Args:
        what: one of them is called, such as "select".
        own: this package's, by name.
        group: of the entry points by which installed packages declare theirs.
        check: raises TypeError for what can have no name here.
        reserved: names that nothing may take.
    """

    def __init__(
        self,
        what: str,
        own: Mapping[str, ThingT],
        group: str,
        check: Callable[[object], None],
        reserved: tuple[str, ...] = (),
    ) -> None:
        self.what = what
        self.own = own
        self.group = group
        self.check = check
        self.reserved = reserved
        self._registered: dict[str, ThingT] = {}
        self._loaded: dict[str, ThingT] = {}

    def __iter__(self) -> Iterator[str]:
        """All names: our own, then those that were registered, then those of entry points. Loads nothing."""
        yield from dict.fromkeys((*self.own, *self._registered, *self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self.own or name in self._registered or name in self._entries

    def items(self) -> Iterator[tuple[str, ThingT]]:
        """All names with their things; entry points are loaded."""
        return ((name, self.get(name)) for name in self)

    def register(self, name: str, thing: ThingT) -> None:
        """Give a thing a name. A module that is loaded anew, or a notebook's cell, replaces its own.

        Raises:
            TypeError: the thing can have no name here.
            ValueError: the name is taken, or is no name.
        """
        self.check(thing)
        if not _NAME.fullmatch(name) or name.endswith(".json"):
            raise ValueError(
                f"The name of a {self.what} must be letters, digits, '_', '-' and '.', begin with a letter and not end "
                f"in .json, got {name!r}."
            )
        taken = self._taken(name, thing)
        if taken is not None:
            raise ValueError(f"The {self.what} {name!r} is {taken} already, got {_place(thing)}: choose another name.")
        self._registered[name] = thing

    def unregister(self, name: str) -> None:
        """Take back what :meth:`register` did.

        Raises:
            ValueError: nothing was registered under this name.
        """
        if name not in self._registered:
            registered = ", ".join(self._registered) or "none"
            raise ValueError(f"No {self.what} {name!r} was registered; those that were are {registered}.")
        del self._registered[name]

    def get(self, name: object, home: object = None) -> ThingT:
        """The thing of a name; an entry point is loaded when it is first asked for.

        Args:
            home: the module that brings it, as a file says that names it.

        Raises:
            ValueError: nothing has this name; the message says what would bring it. Where a home is given, this is a
                :class:`MissingName`.
            TypeError: the entry point of this name can have no name here.
        """
        if isinstance(name, str):
            for known in (self.own, self._registered):
                if name in known:
                    return known[name]
            if name in self._entries:
                return self._load(name)
        sentence = f"Unknown {self.what} {name!r}; known are {', '.join(self)}.{_bringing(home)}"
        raise MissingName(sentence) if isinstance(home, str) else ValueError(sentence)

    def name_of(self, thing: ThingT) -> str | None:
        """The name of a thing; None where it has none."""
        for known in (self.own, self._registered):
            for name, other in known.items():
                if other is thing:
                    return name
        # An entry point may name a class by another module than its own.
        return next((name for name in self._entries if self._load(name) is thing), None)

    def at_hand(self) -> dict[str, ThingT]:
        """All by name but those of entry points that nobody asked for yet."""
        return {**self._loaded, **self._registered, **self.own}

    @cached_property
    def _entries(self) -> dict[str, EntryPoint]:
        found: dict[str, EntryPoint] = {}
        for entry in entry_points(group=self.group):
            # An installed package must not break, nor change, what runs without it.
            if entry.name in self.own or entry.name in self.reserved or entry.name in found:
                logger.warning("The entry point %r of %s is left out: the name is taken.", entry.name, self.group)
            else:
                found[entry.name] = entry
        return found

    def _load(self, name: str) -> ThingT:
        if name not in self._loaded:
            thing = self._entries[name].load()
            try:
                self.check(thing)
            except TypeError as error:
                raise TypeError(f"The entry point {name!r} of {self.group} is of no use: {error}") from error
            self._loaded[name] = thing
        return self._loaded[name]

    def _taken(self, name: str, thing: ThingT) -> str | None:
        """Whose a name is, in words; None where it is free for this thing."""
        if name in self.own or name in self.reserved:
            return "dit_accel's own"
        if name in self._registered and _place(self._registered[name]) != _place(thing):
            return _place(self._registered[name])
        # A package may register what its own entry points name: that is what loading them runs.
        if name in self._entries and _package(self._entries[name].module) != _package(_place(thing)):
            return f"that of the entry point {self._entries[name].value}"
        return None


def _place(thing: object) -> str:
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', repr(thing))}"


def _package(place: str) -> str:
    return place.partition(".")[0]


def _bringing(home: object) -> str:
    """What to do for a name that is missing."""
    if home == "__main__":
        return " A script registered it: put that into a module, and import it first (--import MODULE)."
    if isinstance(home, str):
        return f" {home} registers it: import that module first (--import {home})."
    return " Others come with a module that registers them (--import MODULE), or with an installed package."
