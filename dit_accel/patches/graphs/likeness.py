"""Whether a block is still what it was when its launches were captured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import nn

from ..hook import Hook
from .arguments import CannotCapture

_PLAIN = (type(None), bool, int, float, str)
_WHOLE = (torch.Tensor, nn.Parameter)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_CONTENTS = ("_parameters", "_buffers", "_modules", *_HOOKS)
# What torch itself keeps of a module: of no use beside its contents, and more than all else.
_OF_TORCH = frozenset(nn.Module().__dict__) - {"training", *_CONTENTS}


class Likeness:
    """What a graph has taken for granted of a block: weights at their addresses, modules, what else they and their
    processors hold, hooks, and diffusers' attention backend.

    What a weight holds may change, since graphs read it anew.

    Raises:
        CannotCapture: a module of it does something that a replay would leave out, or that changes without a trace.
    """

    def __init__(self, block: nn.Module) -> None:
        # In one sequence: to compare attributes one by one would cost the host more than a launch.
        self._objects: list[tuple[dict[str, Any], itemgetter[Any]]] = []
        self._contents: list[dict[str, Any]] = []
        self._tensors: list[torch.Tensor] = []
        self._of_parts: list[torch.Tensor] = []  # quantised ones
        for module in block.modules():
            self._look_at(module)
        self._addresses = self._where()
        self._number = self._count()
        self._values = tuple(self._found())
        self._lists = [(value, list(value)) for value in self._values if type(value) is list]
        self._backend = _AttentionBackendRegistry.get_active_backend()

    def _look_at(self, module: nn.Module) -> None:
        kind = type(module)
        if module.training and isinstance(module, nn.modules.dropout._DropoutNd) and module.p:
            raise CannotCapture(f"{kind.__name__} is in training mode: call eval()")
        if kind.__module__.startswith("peft."):
            raise CannotCapture(f"{kind.__name__} of peft may change its scale: fuse the adapter")
        if "forward" in module.__dict__:
            raise CannotCapture(f"another package has replaced the forward of {kind.__name__}, as offloading does")
        for name in _HOOKS:
            if any(not isinstance(hook, Hook) for hook in getattr(module, name).values()):
                raise CannotCapture(f"{kind.__name__} has a hook of another package, which a replay would not call")
        self._look_at_names(module.__dict__)
        self._contents += (found for name in _CONTENTS if (found := getattr(module, name)) is not None)
        self._look_at_tensors({**module._parameters, **module._buffers})
        processor = getattr(module, "processor", None)
        if not isinstance(processor, nn.Module):
            self._look_at_names(getattr(processor, "__dict__", {}))

    def _look_at_names(self, names: dict[str, Any]) -> None:
        kept = [name for name in names if name not in _OF_TORCH]
        if len(kept) > 1:
            self._objects.append((names, itemgetter(*kept)))
        elif kept:
            self._contents.append(names)
        self._look_at_tensors(names)

    def _look_at_tensors(self, names: dict[str, Any]) -> None:
        for one in names.values():
            if isinstance(one, torch.Tensor):
                (self._tensors if type(one) in _WHOLE else self._of_parts).append(one)

    def holds(self) -> bool:
        """Whether all of that is as it was."""
        try:
            return (
                self._count() == self._number
                and (all(map(is_, self._found(), self._values)) or _alike([*self._found()], self._values))
                and all(_alike(now, known) for now, known in self._lists)
                and self._where() == self._addresses
                and self._backend == _AttentionBackendRegistry.get_active_backend()
            )
        except KeyError:  # an attribute is gone
            return False

    def _where(self) -> list[Any]:
        tensors = [*self._tensors, *_parts(self._of_parts)] if self._of_parts else self._tensors
        return [(tensor.data_ptr(), tensor.stride()) for tensor in tensors]

    def _count(self) -> int:
        return sum(map(len, self._contents)) + sum([len(names) for names, _ in self._objects])

    def _found(self) -> Iterator[Any]:
        contents: Iterator[Any] = chain.from_iterable(map(dict.values, self._contents))
        return chain(contents, chain.from_iterable([get(names) for names, get in self._objects]))


def _alike(values: Sequence[Any], known: Sequence[Any]) -> bool:
    """Whether values are the same objects as before, or plain ones that are equal."""
    return len(values) == len(known) and all(
        value is one or (type(value) is type(one) and isinstance(value, _PLAIN) and value == one)
        for value, one in zip(values, known, strict=True)
    )


def _parts(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """What quantised tensors are made of; others are whole."""
    found = []
    for tensor in tensors:
        flatten = None if type(tensor) in _WHOLE else getattr(tensor, "__tensor_flatten__", None)
        found += [tensor] if flatten is None else _parts([getattr(tensor, name) for name in flatten()[0]])
    return found
