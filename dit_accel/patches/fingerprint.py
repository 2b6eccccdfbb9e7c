"""What a file remembers of the model it was made for, and how another model differs from that."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .learned import head_shape, is_learned

SAMPLED_TENSORS = 64
VALUES_PER_TENSOR = 4
# bfloat16 keeps 8 bits: the same weights in another dtype differ by less than this share of the largest.
TOLERANCE = 1 / 64


@dataclass(frozen=True)
class Fingerprint:
    """One transformer, without its weights.

    Attributes:
        transformer: class name.
        layers: number of self-attention layers.
        heads, head_dim: of each of them.
        config: as diffusers saves it, without names and versions.
        weights: a few values of some tensors, by parameter name.
    """

    transformer: str
    layers: int
    heads: int
    head_dim: int
    config: dict[str, Any]
    weights: dict[str, list[float]]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        attentions: Mapping[str, nn.Module],
        trained: Collection[str] = (),
        base: Mapping[str, torch.Tensor] | None = None,
        values: Mapping[str, torch.Tensor] | None = None,
    ) -> Fingerprint:
        """Of a model whose parameters ``trained`` have changed since; ``base`` knows their first values.

        ``values`` holds parameters by name that are not whole in the model, being sharded.
        """
        heads, head_dim = head_shape(next(iter(attentions.values())))
        config = {k: v for k, v in dict(getattr(model, "config", {})).items() if not k.startswith("_")}
        first, whole = base or {}, {_plain(name): value for name, value in (values or {}).items()}
        weights = {
            name: first.get(name, whole.get(name, value))
            for name, value in base_parameters(model).items()
            if value.is_floating_point() and (name in first or name not in trained)
        }
        names = sorted(weights)
        names = names[:: max(1, len(names) // SAMPLED_TENSORS)][:SAMPLED_TENSORS]
        return cls(
            transformer=_own_class(model).__name__,
            layers=len(attentions),
            heads=heads,
            head_dim=head_dim,
            config=json.loads(json.dumps(config, default=str)),
            weights={name: _values(weights[name]) for name in names},
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Fingerprint:
        """The inverse of :meth:`to_dict`."""
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def difference(self, model: nn.Module, attentions: Mapping[str, nn.Module]) -> str | None:
        """How a model differs from this one, in words; None if the file fits it."""
        other = Fingerprint.of(model, attentions)
        for name in ("transformer", "heads", "head_dim", "layers"):
            mine, its = getattr(self, name), getattr(other, name)
            if mine != its:
                spelled = {"transformer": "a", "layers": "self-attention"}.get(name, "")
                return f"it is for {spelled} {name.replace('_', ' ')} {mine}, the model has {its}".replace("  ", " ")
        for name in sorted(self.config.keys() & other.config.keys()):
            if self.config[name] != other.config[name]:
                return f"it is for a model with {name} = {self.config[name]!r}, this one has {other.config[name]!r}"
        parameters = base_parameters(model)
        for name, values in self.weights.items():
            if name not in parameters:
                return f"the model has no parameter {name}"
            its_values = _values(parameters[name])
            bound = TOLERANCE * max(map(abs, values + its_values), default=0.0)
            if any(abs(a - b) > bound for a, b in zip(values, its_values, strict=True)):
                return (
                    f"it is for other weights: {name} begins with {values[0]:.4g}, the model's with {its_values[0]:.4g}"
                )
        return None


def base_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's own parameters by the names they have without LoRA layers around them."""
    return {
        _plain(name): value for name, value in model.named_parameters() if not is_learned(name) and ".lora_" not in name
    }


def _own_class(model: nn.Module) -> type:
    """A model's class before FSDP gave it one that it made for it."""
    return next(kind for kind in type(model).__mro__ if not kind.__module__.startswith("torch.distributed."))


def _plain(name: str) -> str:
    """A parameter's name without LoRA layers around it."""
    return name.replace(".base_layer.", ".")


def _values(tensor: torch.Tensor) -> list[float]:
    flat = tensor.detach().flatten()
    count = min(VALUES_PER_TENSOR, flat.numel())
    picks = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long()
    values: list[float] = flat[picks.to(flat.device)].float().tolist()
    return values
