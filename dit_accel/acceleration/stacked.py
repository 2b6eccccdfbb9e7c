"""Changes of one module by several who do not know of each other, undone in any order."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import nn


class StackedChange:
    """A change of a module on top of those that are there, until it is undone.

    Pipelines share autoencoders, and nobody says whose change goes first. What lies on top of it is taken off
    meanwhile and put on again, so that what is left is what the others alone would have made.

    Args:
        module: what is changed.
        put_on: makes the change and returns its undo; after an error nothing of it is left.
    """

    def __init__(self, module: nn.Module, put_on: Callable[[], Callable[[], None]]) -> None:
        self._module = module
        self._put_on = put_on
        self._take_off = put_on()
        _stacks.setdefault(module, []).append(weakref.ref(self))

    def undo(self) -> None:
        """Take this change back, and leave those that came later. Undoing twice does nothing."""
        stack = [change for change in (held() for held in _stacks[self._module]) if change is not None]
        if self not in stack:
            return
        place = stack.index(self)
        later = stack[place + 1 :]
        for change in reversed(stack[place:]):
            change._take_off()
        _stacks[self._module] = [weakref.ref(change) for change in (*stack[:place], *later)]
        for change in later:
            change._take_off = change._put_on()


# Of each module, the first change at the bottom. One that nobody can undo any more stays, and is not kept here.
_stacks: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[StackedChange]]] = weakref.WeakKeyDictionary()
