"""What a block is given and returns, as tensors and as the form that holds them."""

from __future__ import annotations

from typing import Any

import torch

Form = Any
"""Equal for two values whose tensors have the same shapes, strides, dtypes and devices, and whose rest is equal."""

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class CannotCapture(Exception):
    """Why a block's launches cannot be replayed, a sentence without its end."""


class _OfTensor:
    """The place of a tensor in a form, among the tensors of a value; the same tensor has one place."""

    __slots__ = ("facts", "place")

    def __init__(self, place: int, tensor: torch.Tensor) -> None:
        self.place = place
        self.facts = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _OfTensor) and self.place == other.place and self.facts == other.facts

    __hash__ = None  # type: ignore[assignment]


def taken_apart(value: Any) -> tuple[list[torch.Tensor], Form]:
    """The tensors of nested tuples, lists and dictionaries, and their form.

    Raises:
        CannotCapture: something else than tensors and plain values is among them.
    """
    tensors: list[torch.Tensor] = []
    return tensors, _form(value, tensors, {})


def put_together(form: Form, tensors: list[torch.Tensor]) -> Any:
    """The value of a form with other tensors."""
    if isinstance(form, _OfTensor):
        return tensors[form.place]
    kind, items = form
    if kind is tuple or kind is list:
        return kind(put_together(item, tensors) for item in items)
    if kind is dict:
        return {name: put_together(item, tensors) for name, item in items}
    return items


def _form(value: Any, tensors: list[torch.Tensor], places: dict[int, int]) -> Form:
    if isinstance(value, torch.Tensor):
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise CannotCapture(f"a {type(value).__name__} is among a block's arguments")
        if value.is_conj() or value.is_neg():  # which a copy is no longer, and some kernels then round otherwise
            raise CannotCapture("a block's argument is conjugated or negated only when it is read")
        place = places.setdefault(id(value), len(tensors))
        if place == len(tensors):
            tensors.append(value)
        return _OfTensor(place, value)
    kind = type(value)
    if kind is tuple or kind is list:
        return kind, [_form(item, tensors, places) for item in value]
    if kind is dict:
        return dict, [(name, _form(item, tensors, places)) for name, item in value.items()]
    if kind not in _PLAIN:
        raise CannotCapture(f"a {kind.__name__} is among a block's arguments")
    return kind, value
