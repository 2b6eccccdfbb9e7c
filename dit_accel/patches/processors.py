"""Attention processors that are set after patching."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .seam import divert, seam_symbol


class ProcessorWatch:
    """Diverts the attention symbol of every processor that a patched transformer has, also of later ones.

    Args:
        model: the transformer; its end gives the symbols back.
        modules: its self-attention modules.
        record: remembers how to undo a mutation.

    Raises:
        ValueError: a processor reaches attention through no symbol that is known.
    """

    def __init__(self, model: nn.Module, modules: Sequence[Any], record: Callable[[Callable[[], None]], None]) -> None:
        self._model = weakref.ref(model)
        self._modules = modules
        self._record = record
        self._kinds = {type(module.processor) for module in modules}
        self._symbols: set[tuple[str, str]] = set()
        for symbol in {seam_symbol(module.processor) for module in modules}:
            self._divert(symbol)

    def __call__(self) -> None:
        """Look for new processors. Called before each eager forward; costs a look at the class of each."""
        for module in self._modules:
            if type(module.processor) not in self._kinds:
                self._kinds.add(type(module.processor))
                try:
                    self._divert(seam_symbol(module.processor))
                except ValueError:
                    # It cannot be taken; the hook behind the module counts its calls.
                    continue

    def _divert(self, symbol: tuple[str, str]) -> None:
        model = self._model()
        if symbol not in self._symbols and model is not None:
            self._symbols.add(symbol)
            self._record(weakref.finalize(model, divert(*symbol)))
