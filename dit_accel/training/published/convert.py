"""A published checkpoint as an adapter of this package, for one model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...patches.learned import CHILD, head_shape
from ...patches.weights import weights_of
from ...recipe import Recipe
from ..adapter_files import AdapterFiles
from ..lora import LoraSettings
from .formats import Published


def as_adapter(
    published: Published, part: str, model: nn.Module, attentions: Mapping[str, nn.Module], recipe: Recipe, name: str
) -> AdapterFiles:
    """The adapter that a checkpoint is for a model.

    Args:
        published: the checkpoint.
        part: name of the transformer.
        model: the transformer, patched or not.
        attentions: its self-attentions by path.
        recipe: that it will run with.
        name: of the checkpoint, for messages.

    Raises:
        ValueError: it does not fit the model by key and shape; one sentence names the first tensor that does not.
    """
    learned = _learned(published, attentions, name)
    weights = _like(model, published.weights)
    if weights:
        _refuse_incomplete(model, weights, name)
    lora, settings = _one_rank(published.lora)
    kinds = {"learned": learned, "full": weights, "delta": _like(model, published.added), "lora": lora}
    return AdapterFiles(
        folder=Path(name),
        recipe=recipe,
        base={},
        backbone="full" if weights else "lora" if settings is not None else "delta",
        lora={} if settings is None else {part: settings},
        tensors={part: {kind: found for kind, found in kinds.items() if found}},
    )


def _learned(published: Published, attentions: Mapping[str, nn.Module], name: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    if published.learned and (odd := sorted(published.learned.keys() ^ attentions.keys())):
        where = "in the checkpoint alone" if odd[0] in published.learned else "in the model alone"
        raise ValueError(f"{name} ({published.format}) does not fit the model: the attention {odd[0]} is {where}.")
    for path, parameters in published.learned.items():
        heads, head_dim = head_shape(attentions[path])
        linear: Any = getattr(attentions[path], "to_q", None)
        width = getattr(linear, "in_features", heads * head_dim)
        is_gate = published.recipe is not None and published.recipe.compensate.reads_input
        rows, columns = (heads * head_dim, width) if is_gate else (head_dim, head_dim)
        for leaf, shape in (("weight", (rows, columns)), ("bias", (rows,))):
            value = parameters.get(leaf)
            if value is None or tuple(value.shape) != shape:
                has = "is missing" if value is None else f"has shape {tuple(value.shape)}"
                raise ValueError(
                    f"{name} ({published.format}) does not fit the model: the {leaf} of {path} {has}, the model takes "
                    f"{shape}."
                )
            found[f"{path}.{CHILD}.{leaf}"] = value
    return found


def _like(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors in the shapes that a model has them in, where they are only written otherwise: Wan's patch embedding is a
    linear layer in some repositories, and a modulation lacks its leading one."""
    own = weights_of(model)
    return {
        name: value.reshape(own[name].shape)
        if name in own and value.numel() == own[name].shape.numel() and _same_rows(value, own[name].shape)
        else value
        for name, value in tensors.items()
    }


def _same_rows(value: torch.Tensor, shape: torch.Size) -> bool:
    squeezed = tuple(size for size in value.shape if size > 1), tuple(size for size in shape if size > 1)
    return squeezed[0] == squeezed[1] or (value.dim() == 2 and len(shape) == 5 and value.shape[0] == shape[0])


def _refuse_incomplete(model: nn.Module, weights: Mapping[str, torch.Tensor], name: str) -> None:
    own = weights_of(model)
    missing = sorted(own.keys() - weights.keys())
    if missing:
        raise ValueError(f"{name} does not fit {type(model).__name__}: it has no {missing[0]}.")
    for key, value in weights.items():
        shape = own[key].shape if key in own else None
        if shape != value.shape:
            has = "no such parameter" if shape is None else f"one of {tuple(shape)}"
            raise ValueError(
                f"{name} does not fit {type(model).__name__}: it has {key} of {tuple(value.shape)}, the model {has}."
            )


def _one_rank(
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
) -> tuple[dict[str, torch.Tensor], LoraSettings | None]:
    """LoRA layers of one rank: those of a lower one get rows and columns of zeros."""
    if not pairs:
        return {}, None
    rank = max(down.shape[0] for down, _ in pairs.values())
    state = {}
    for path, (down, up) in pairs.items():
        more = rank - down.shape[0]
        state[f"{path}.lora_A.weight"] = F.pad(down, (0, 0, 0, more))
        state[f"{path}.lora_B.weight"] = F.pad(up, (0, more))
    return state, LoraSettings(rank, float(rank), tuple(sorted(pairs)))
