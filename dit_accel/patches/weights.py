"""A model's own weights, wherever they are kept; apart from LoRA layers and what these have been fused into, and with
fused projections as the parts that they were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .learned import is_learned
from .offloading import Place, Places, UnreadableWeight, parents

# What wrappers put into the names of the parameters inside: peft, torch.compile, activation checkpointing.
WRAPPERS = ("base_layer", "_orig_mod", "_checkpoint_wrapped_module")
# Of diffusers' ``fuse_qkv_projections``, in the order of their rows. The parts stay beside it, unused.
FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}
_ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Weight:
    """One of a model's own parameters.

    Attributes:
        places: where its values are, first those that the model computes with; of a fused projection some rows.
        merges: peft layers that may have added to the first of them, and the rows of theirs that are this weight's.
    """

    places: tuple[tuple[Place, slice], ...]
    merges: tuple[tuple[Any, slice], ...] = ()

    @property
    def shape(self) -> torch.Size:
        """Its shape."""
        place, rows = self.places[0]
        whole = place.parameter.shape
        return whole if rows == _ALL else torch.Size((rows.stop - rows.start, *whole[1:]))

    @property
    def dtype(self) -> torch.dtype:
        """In which it is stored."""
        return self.places[0][0].parameter.dtype

    @property
    def why_fixed(self) -> str | None:
        """Why other values cannot be put in, as the end of a sentence; None where they can."""
        if not self.dtype.is_floating_point or has_own_storage(self.places[0][0].parameter):
            return "is quantised"
        return next((why for place, _ in self.places if (why := place.why_fixed) is not None), None)

    def read(self) -> torch.Tensor:
        """The values, in the dtype and on the device that they are stored in.

        Raises:
            UnreadableWeight: they are on the meta device, and no offloading hook holds them.
        """
        place, rows = self.places[0]
        whole = place.read()
        return whole if rows == _ALL else whole[rows]

    def write(self, value: torch.Tensor) -> None:
        """Put other values in, in the dtype and on the device of the present ones."""
        for place, rows in self.places:
            whole = value
            if rows != _ALL:
                whole = place.read().clone()
                whole[rows] = value.to(whole.device, whole.dtype)
            place.write(whole)

    def merged_change(self) -> torch.Tensor | None:
        """What fused LoRA layers have added to the values, float32; None for nothing.

        Raises:
            UnreadableWeight: an adapter that is no plain LoRA is fused into them.
        """
        total: torch.Tensor | None = None
        for layer, rows in self.merges:
            for adapter in layer.merged_adapters:
                change = lora_product(layer, adapter)[rows]
                total = change if total is None else total + change
        return total


def weights_of(model: nn.Module) -> dict[str, Weight]:
    """A model's own parameters by :func:`plain_name`: none of LoRA layers, and none of a recipe.

    A tied parameter is there under each of its names.
    """
    places = Places(model)
    layers = {path: module for path, module in model.named_modules() if _is_peft_layer(module)}
    found = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        if is_learned(name):
            continue
        around = next((path for path in parents(name) if path in layers), None)
        if around is None:
            found[plain_name(name)] = Weight(((places[name], _ALL),))
        elif name.startswith(_join(around, "base_layer.")):
            changed = name.endswith(".weight")
            found[plain_name(name)] = Weight(((places[name], _ALL),), ((layers[around], _ALL),) if changed else ())
    for fused, parts in fused_rows(model).items():
        whole = found.pop(fused)
        ((place, _),) = whole.places
        for name, rows in parts.items():
            merges: tuple[tuple[Any, slice], ...] = tuple((layer, rows) for layer, _ in whole.merges)
            part = found[name]
            # A LoRA that was fused into the part first is in the fused rows too.
            if any(layer.merged_adapters for layer, _ in part.merges) and _equal(place.read()[rows], part.read()):
                merges = (*merges, *part.merges)
            found[name] = Weight(((place, rows), *part.places), merges)
    return found


def stored_parameters(model: nn.Module) -> dict[str, Weight]:
    """All parameters by the names that ``named_parameters`` gives them, learned ones and LoRA layers included."""
    places = Places(model)
    return {name: Weight(((places[name], _ALL),)) for name, _ in model.named_parameters()}


def plain_name(name: str) -> str:
    """The name of a parameter or module without the wrappers around it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def fused_rows(model: nn.Module) -> dict[str, dict[str, slice]]:
    """Parameters of fused projections, by plain name, and the rows of each of their parts."""
    found: dict[str, dict[str, slice]] = {}
    for path, module in model.named_modules():
        if not getattr(module, "fused_projections", False):
            continue
        for fused, names in FUSED.items():
            parts = [getattr(module, name, None) for name in names]
            whole = getattr(module, fused, None)
            if whole is None or None in parts:
                continue
            for leaf in ("weight", "bias"):
                if getattr(whole, leaf, None) is None:
                    continue
                start, rows = 0, {}
                for name, part in zip(names, parts, strict=True):
                    length = getattr(part, leaf).shape[0]
                    rows[plain_name(_join(path, f"{name}.{leaf}"))] = slice(start, start + length)
                    start += length
                found[plain_name(_join(path, f"{fused}.{leaf}"))] = rows
    return found


def unfused(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by plain name, those of fused projections as their parts."""
    plain = {plain_name(name): tensor for name, tensor in tensors.items()}
    for fused, parts in fused_rows(model).items():
        if fused in plain:
            whole = plain.pop(fused)
            plain.update({name: whole[rows] for name, rows in parts.items()})
    return plain


def has_own_storage(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a class that stores its values in a way of its own, as quantised ones do."""
    return getattr(type(tensor), "dequantize", torch.Tensor.dequantize) != torch.Tensor.dequantize


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one, other.to(one.device, one.dtype))


def _is_peft_layer(module: nn.Module) -> bool:
    return isinstance(getattr(module, "base_layer", None), nn.Module) and hasattr(module, "merged_adapters")


def is_plain_lora(layer: Any, adapter: str) -> bool:
    """Whether a peft layer's adapter adds the product of two matrices to the weight of a linear layer, and no more."""
    if adapter not in getattr(layer, "lora_A", {}) or getattr(layer, "fan_in_fan_out", False):
        return False
    other_kind = adapter in getattr(layer, "lora_variant", {}) or getattr(layer, "use_dora", {}).get(adapter, False)
    return (
        not other_kind and not getattr(layer, "lora_bias", {}).get(adapter) and layer.lora_A[adapter].weight.dim() == 2
    )


def lora_product(layer: Any, adapter: str) -> torch.Tensor:
    """What a peft layer's LoRA adds to the weight when it is fused, float32.

    Raises:
        UnreadableWeight: the adapter is of another kind.
    """
    if not is_plain_lora(layer, adapter):
        raise UnreadableWeight(f"adapter {adapter!r}, which is no plain LoRA, is fused into them")
    # Its own layers may be offloaded too.
    down, up = (Places(half[adapter])["weight"].read().float() for half in (layer.lora_A, layer.lora_B))
    return float(layer.scaling[adapter]) * (up @ down)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
