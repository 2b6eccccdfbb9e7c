"""Operators in the order in which they ran, to run them again on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Storage = int
"""Address of torch's own object."""


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> Storage:
    return int(tensor.untyped_storage()._cdata)


class Tape(TorchDispatchMode):
    """Records what runs in it. What that changes of older memory can be undone, as if nothing had run yet."""

    def __init__(self) -> None:
        super().__init__()
        self._ran: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []
        self._own: set[Storage] = set()
        self._before: dict[Storage, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        if func._schema.is_mutable:
            for tensor in _tensors((args, kwargs)):
                place = _storage(tensor)
                if place not in self._own and place not in self._before:
                    storage = tensor.untyped_storage()
                    self._before[place] = (storage, storage.clone())
        out = func(*args, **kwargs)
        self._own |= {_storage(tensor) for tensor in _tensors(out)} - given
        self._ran.append((func, args, kwargs, out))
        return out

    def undo(self) -> None:
        """Give memory that is older than the tape what it held."""
        for storage, before in self._before.values():
            storage.copy_(before)
        self._before.clear()

    @torch.no_grad()
    def replay(self) -> None:
        """Run it again."""
        for func, args, kwargs, out in self._ran:
            given = {_storage(tensor) for tensor in _tensors((args, kwargs))}
            for made, tensor in zip(_tensors(func(*args, **kwargs)), _tensors(out), strict=True):
                if _storage(tensor) not in given:
                    torch.Tensor.copy_(tensor, made)
