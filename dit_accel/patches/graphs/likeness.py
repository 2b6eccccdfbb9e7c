"""Whether a block is still what it was when its launches were captured."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..hooks import Hook
from .arguments import CannotCapture

Addresses = Any
_SETTINGS = (type(None), bool, int, float, str, list, tuple)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Likeness:
    """What a graph has taken for granted of a block: weights at their addresses, modules, processors and hooks.

    What a weight holds may change, since graphs read it anew.

    Raises:
        CannotCapture: a module of it does something that a replay would leave out, or that changes without a trace.
    """

    def __init__(self, block: nn.Module) -> None:
        self._tensors: list[tuple[dict[str, Any], str, torch.Tensor, Addresses]] = []
        self._children: list[tuple[dict[str, Any], list[Any]]] = []
        self._counts: list[tuple[dict[Any, Any], int]] = []
        self._processors: list[tuple[nn.Module, Any, dict[str, Any]]] = []
        for module in block.modules():
            self._look_at(module)

    def _look_at(self, module: nn.Module) -> None:
        kind = type(module)
        if module.training and isinstance(module, nn.modules.dropout._DropoutNd) and module.p:
            raise CannotCapture(f"{kind.__name__} is in training mode: call eval()")
        if kind.__module__.startswith("peft."):
            raise CannotCapture(f"{kind.__name__} of peft may change its scale: fuse the adapter")
        if "forward" in module.__dict__:
            raise CannotCapture(f"another package has replaced the forward of {kind.__name__}, as offloading does")
        for name in _HOOKS:
            hooks = getattr(module, name)
            foreign = [hook for hook in hooks.values() if not isinstance(hook, Hook)]
            if foreign:
                raise CannotCapture(f"{kind.__name__} has a hook of another package, which a replay would not call")
            self._counts.append((hooks, len(hooks)))
        for owner in (module._parameters, module._buffers):
            for name, tensor in owner.items():
                if tensor is not None:
                    self._tensors.append((owner, name, tensor, _addresses(tensor)))
        if module._modules:
            self._children.append((module._modules, list(module._modules.values())))
        if hasattr(module, "processor"):
            self._processors.append((module, module.processor, _settings(module.processor)))

    def holds(self) -> bool:
        """Whether all of that is as it was."""
        return (
            all(owner.get(name) is one and _addresses(one) == at for owner, name, one, at in self._tensors)
            and all(list(owner.values()) == known for owner, known in self._children)
            and all(len(hooks) == number for hooks, number in self._counts)
            and all(
                module.processor is known and _settings(known) == settings
                for module, known, settings in self._processors
            )
        )


def _settings(processor: Any) -> dict[str, Any]:
    """Numbers and names that a processor holds, such as scales, which others set."""
    return {
        name: list(value) if isinstance(value, list) else value
        for name, value in getattr(processor, "__dict__", {}).items()
        if isinstance(value, _SETTINGS)
    }


def _addresses(tensor: torch.Tensor) -> Addresses:
    """Where it lies; of a quantised tensor, where its parts lie."""
    if type(tensor) in (torch.Tensor, nn.Parameter):
        return tensor.data_ptr()
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return tensor.data_ptr()
    return tuple(_addresses(getattr(tensor, name)) for name in flatten()[0])
