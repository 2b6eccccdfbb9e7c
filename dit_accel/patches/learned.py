"""Learned parameters of a recipe as modules under the attention layers: seen by optimizers, left out of saved
pipelines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..stages.compensate.protocol import Compensation
from ..stages.learned_layer import LearnedLayer
from .hook import Hook
from .in_place import InPlaceOf
from .offloading import join_offloading

CHILD = "dit_accel"
"""Name of the module under an attention layer, of a compensation."""
ROUTER = "dit_accel_router"
"""The same of a selection."""


def head_shape(module: Any) -> tuple[int, int]:
    """Heads of a diffusers attention module, and features of each.

    Raises:
        ValueError: the module does not tell.
    """
    heads, inner = getattr(module, "heads", None), getattr(module, "inner_dim", None)
    if inner is None and hasattr(module, "to_q"):
        inner = module.to_q.out_features
    if not heads or not inner:
        raise ValueError(f"{type(module).__name__} does not tell its number of heads and their size.")
    return int(heads), int(inner) // int(heads)


def build(module: Any, compensate: Compensation) -> LearnedLayer:
    """The learned part of a compensation for an attention layer.

    Raises:
        ValueError: the module does not tell what size it is.
    """
    heads, head_dim = head_shape(module)
    if not compensate.reads_input:
        return compensate.build(heads, head_dim)
    found: tuple[Any, ...] = tuple(getattr(module, name, None) for name in ("to_q", "to_qkv"))
    width = next((linear.in_features for linear in found if hasattr(linear, "in_features")), None)
    if width is None:
        raise ValueError(f"{type(module).__name__} does not tell the width of its input.")
    return compensate.build_gate(heads, head_dim, int(width))


def attach(
    module: nn.Module, learned: LearnedLayer, model: nn.Module | None = None, name: str = CHILD
) -> Callable[[], None]:
    """Put parameters under an attention layer of a model, on its device. Returns the undo."""
    device = next((p.device for p in module.parameters() if p.device.type != "meta"), None)
    module.add_module(name, learned if device is None else learned.to(device))
    learned.register_forward_pre_hook(FollowData())
    leave = None if model is None else join_offloading(model, learned)

    def undo() -> None:
        module._modules.pop(name, None)
        if leave is not None:
            leave()

    return undo


class FollowData(Hook):
    """Forward pre-hook: offloading that began before the patch does not move what the patch adds."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        data: torch.Tensor = args[0]
        if any(parameter.device not in (data.device, torch.device("meta")) for parameter in module.parameters()):
            module.to(data.device)


def is_learned(name: str) -> bool:
    """Whether a parameter's name is that of a recipe's parameter, not of the model's own."""
    return any(f".{child}." in f".{name}" for child in (CHILD, ROUTER))


class SaveWithoutLearned(InPlaceOf):
    """Stands in for a model's ``save_pretrained``: what it writes loads in stock diffusers."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: nn.Module = self.original.__self__  # type: ignore[attr-defined]
        hook = model.register_state_dict_post_hook(_drop_learned)
        try:
            return self.original(*args, **kwargs)
        finally:
            hook.remove()


def _drop_learned(_module: nn.Module, state: dict[str, Any], _prefix: str, _metadata: Any) -> None:
    for name in [name for name in state if is_learned(name)]:
        del state[name]
