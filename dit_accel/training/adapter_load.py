"""Putting an adapter's tensors into one transformer: all is checked first, and all can be undone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..patches.learned import is_learned
from ..patches.samples import pick
from ..patches.weights import Weight, plain_name, stored_parameters, unfused, weights_of
from .adapter_files import AdapterFiles, from_integers
from .lora import load_lora, why_not_lora

# Enough for a LoRA that was fused in between to show.
MARKS = 256


class LoadPlan:
    """What an adapter changes in a patched transformer.

    Args:
        name: of the transformer in the adapter.
        model: the transformer.
        files: the adapter.

    Raises:
        ValueError: a tensor has no place in the model, or another shape. Nothing has been touched then.
    """

    def __init__(self, name: str, model: Any, files: AdapterFiles) -> None:
        self.model = model
        self.lora = files.of_kind(name, "lora")
        self.lora_settings = files.lora.get(name)
        own = _by_plain_name(model)
        learned = files.of_kind(name, "learned")
        wanted = {n for n in own if is_learned(n)}
        if wanted != set(learned):
            odd = sorted(wanted ^ set(learned))[0]
            raise ValueError(f"The adapter in {files.folder} and the recipe's parameters differ: {odd}.")
        self.learned = {n: (own[n], value) for n, value in learned.items()}
        # Beside LoRA layers there may be differences, of biases and norms.
        self.is_delta = files.backbone != "full"
        changed = unfused(model, files.of_kind(name, "delta" if self.is_delta else "full"))
        scales = unfused(model, files.of_kind(name, "scale"))
        self.changes: dict[str, _Change] = {}
        for n, value in {**learned, **changed}.items():
            weight = own.get(n)
            if weight is None or weight.shape != value.shape:
                spelled = "is missing" if weight is None else f"has shape {tuple(weight.shape)}"
                raise ValueError(f"In the adapter {n} has shape {tuple(value.shape)}; in the model it {spelled}.")
            if weight.why_fixed is not None:
                raise ValueError(f"The adapter in {files.folder} changes {n}, which {weight.why_fixed}.")
            if n in changed:
                self.changes[n] = _Change(weight, value, scales.get(n), is_delta=self.is_delta)
        if self.lora_settings is not None:
            why = why_not_lora(model, self.lora, self.lora_settings)
            if why is not None:
                raise ValueError(f"The adapter in {files.folder} cannot be loaded: {why}.")

    def apply(self, undo: list[Callable[[], None]]) -> None:
        """Put the tensors in; ``undo`` gets what takes them out again, to be run last first."""
        for weight, value in self.learned.values():
            undo.append(partial(weight.write, weight.read().clone()))
            weight.write(value)
        done: dict[str, _Change] = {}
        undo.append(partial(_take_out, self.model, done))
        for name, change in self.changes.items():
            done[name] = change
            change.apply()
        if self.lora_settings is not None:
            undo.append(load_lora(self.model, self.lora, self.lora_settings))


@dataclass(eq=False)
class _Change:
    """What becomes of one weight.

    Attributes:
        weight: of the model.
        value: what it becomes, or with ``is_delta`` what is added to it; integers have a ``scale`` for each row.
        before: what it was, as stored.
        merged: what LoRA layers had been fused into it.
        marks: a few of the values put in.
    """

    weight: Weight
    value: torch.Tensor
    scale: torch.Tensor | None
    is_delta: bool
    before: torch.Tensor | None = None
    merged: torch.Tensor | float = 0.0
    marks: torch.Tensor | None = None

    def apply(self) -> None:
        """Change the weight. A LoRA that is fused into it stays in it."""
        before, merged = self.weight.read(), self.weight.merged_change()
        self.before, self.merged = before, 0.0 if merged is None else merged.to(before.device)
        value = self._value(before.device)
        self.weight.write(rounded(before.float() + value if self.is_delta else value + self.merged, before.dtype))
        self.marks = pick(self.weight.read(), MARKS).cpu()

    def take_out(self, weight: Weight) -> None:
        """Bring the very tensor back; or, where something else was added since, such as a LoRA, leave that in."""
        now = weight.read()
        if self.before is None:
            return
        if self.marks is None or torch.equal(pick(now, MARKS).cpu(), self.marks.to(now.dtype)):
            weight.write(self.before)
            return
        value = self._value(now.device)
        change = value if self.is_delta else value + self.merged - self.before.to(now.device).float()
        weight.write(rounded(now.float() - change, now.dtype))

    def _value(self, device: torch.device) -> torch.Tensor:
        value = self.value.float() if self.scale is None else from_integers(self.value, self.scale)
        return value.to(device)


def rounded(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast, to eight bits at random: what is far smaller than a step is then there on average, and not lost.

    The chance of a neighbour is the nearness to it, from a fixed seed; numbers that the format has stay.
    """
    if dtype.itemsize > 1:
        return value.to(dtype)
    info = torch.finfo(dtype)
    size = value.abs().clamp(max=info.max)
    exponent = torch.frexp(size.clamp_min(info.smallest_normal)).exponent - 1
    step = torch.ldexp(torch.full_like(size, info.eps), exponent)
    steps = size / step
    chance = torch.rand(value.shape, generator=torch.Generator().manual_seed(0)).to(value.device)
    return ((steps.floor() + (chance < steps - steps.floor())) * step).copysign(value).to(dtype)


def _by_plain_name(model: nn.Module) -> dict[str, Weight]:
    """A model's parameters, learned ones and LoRA layers included."""
    return {**{plain_name(name): weight for name, weight in stored_parameters(model).items()}, **weights_of(model)}


def _take_out(model: nn.Module, changes: dict[str, _Change]) -> None:
    """The names are looked up anew: offloading, LoRA and fused projections replace parameters."""
    own = _by_plain_name(model) if changes else {}
    for name, change in changes.items():
        if name in own and own[name].why_fixed is None:
            change.take_out(own[name])
