"""What a file remembers of the model it was made for, and how another model differs from that."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from .learned import head_shape
from .offloading import UnreadableWeight
from .samples import WeightSample, in_one_format, sample
from .weights import Weight, fused_rows, plain_name, unfused, weights_of

SAMPLED_MATRICES, SAMPLED_VECTORS = 64, 32


@dataclass(frozen=True)
class Fingerprint:
    """One transformer, without its weights.

    The same weights have the same fingerprint however they are stored: offloaded, cast to another dtype, eight bits
    included, with fused projections, with LoRA layers beside them or fused into them. A LoRA that was fused and then
    unloaded has changed the weights for good.

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
    weights: dict[str, WeightSample]

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

        Raises:
            ValueError: the weights' values cannot be read: they are on the meta device without an offloading hook.
        """
        own, first, whole = weights_of(model), unfused(model, base or {}), unfused(model, values or {})
        changed = {plain_name(name) for name in trained}
        changed |= {part for name, parts in fused_rows(model).items() if name in changed for part in parts}
        names = [n for n, w in own.items() if w.dtype.is_floating_point and (n in first or n not in changed)]
        matrices = _spread([name for name in names if len(own[name].shape) > 1], SAMPLED_MATRICES)
        vectors = _spread([name for name in names if len(own[name].shape) <= 1], SAMPLED_VECTORS)
        found, why = {}, "there are none"
        for name in (*matrices, *vectors):
            try:
                found[name] = _sample(own[name], first.get(name, whole.get(name)))
            except UnreadableWeight as error:
                why = str(error)
        if not found:
            raise ValueError(f"The weights of {type(model).__name__} cannot be read: {why}.")
        return cls(**_shape(model, attentions), weights=in_one_format(found, matrices))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Fingerprint:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: the data is something else; the message ends a sentence.
        """
        kinds = {"transformer": str, "layers": int, "heads": int, "head_dim": int, "config": dict, "weights": dict}
        if not isinstance(data, Mapping) or set(data) != set(kinds):
            raise ValueError(f"a fingerprint has {', '.join(field.name for field in fields(cls))}")
        for name, kind in kinds.items():
            if not isinstance(data[name], kind):
                raise ValueError(f"{name} in a fingerprint must be of type {kind.__name__}, got {data[name]!r}")
        weights = {name: WeightSample.from_json(values) for name, values in data["weights"].items()}
        return cls(**{**data, "weights": weights})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def difference(self, model: nn.Module, attentions: Mapping[str, nn.Module]) -> str | None:
        """How a model differs from this one, in words; None if the file fits it."""
        its = _shape(model, attentions)
        for name in ("transformer", "heads", "head_dim", "layers"):
            if getattr(self, name) != its[name]:
                spelled = {"transformer": "a ", "layers": "self-attention "}.get(name, "") + name.replace("_", " ")
                return f"it is for {spelled} {getattr(self, name)}, the model has {its[name]}"
        for name in sorted(self.config.keys() & its["config"].keys()):
            if self.config[name] != its["config"][name]:
                return f"it is for a model with {name} = {self.config[name]!r}, this one has {its['config'][name]!r}"
        return self._other_weights(model)

    def _other_weights(self, model: nn.Module) -> str | None:
        own, found, why = weights_of(model), {}, None
        # A module that quantisation has put in another's place may have no parameters at all.
        emptied = {plain_name(path) for path, module in model.named_modules() if not list(module.parameters())}
        for name, mine in self.weights.items():
            if name not in own and name.rpartition(".")[0] not in emptied:
                return f"the model has no parameter {name}"
            try:
                if name not in own:
                    raise UnreadableWeight("they are quantised")
                found[name] = _sample(own[name], count=len(mine.values))
            except UnreadableWeight as error:
                why = str(error)
        if self.weights and not found:
            return f"the model's weights cannot be read: {why}"
        for name, its in in_one_format(found, [name for name in found if len(own[name].shape) > 1]).items():
            apart = self.weights[name].apart(its)
            if apart is not None:
                return f"it is for other weights: {name} has a {apart[0]:.4g} where the model has {apart[1]:.4g}"
        return None


def _shape(model: nn.Module, attentions: Mapping[str, nn.Module]) -> dict[str, Any]:
    """All of a fingerprint but the weights."""
    heads, head_dim = head_shape(next(iter(attentions.values())))
    config = {k: v for k, v in dict(getattr(model, "config", {})).items() if not k.startswith("_")}
    return {
        "transformer": _own_class(model).__name__,
        "layers": len(attentions),
        "heads": heads,
        "head_dim": head_dim,
        "config": json.loads(json.dumps(config, default=str)),
    }


def _own_class(model: nn.Module) -> type:
    """A model's class before FSDP gave it one that it made for it."""
    return next(kind for kind in type(model).__mro__ if not kind.__module__.startswith("torch.distributed."))


def _spread(names: Sequence[str], count: int) -> list[str]:
    """At most ``count`` of the names, from first to last."""
    ordered = sorted(names)
    if len(ordered) <= count:
        return ordered
    return [ordered[n * (len(ordered) - 1) // (count - 1)] for n in range(count)]


def _sample(weight: Weight, value: torch.Tensor | None = None, **options: int) -> WeightSample:
    """Of a weight, or of the value given in its place, without what is fused into it."""
    return sample(weight.read() if value is None else value, weight.merged_change(), **options)
