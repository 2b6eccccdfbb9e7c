"""Which calibration is this? All that its runs depend on, as plain data, and where two differ."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import nn

from ..patches.offloading import UnreadableWeight
from ..patches.samples import pick
from ..patches.weights import plain_name, stored_parameters
from ..plain_data import digest

# Of every tensor.
VALUES = 16


def describe(value: Any) -> Any:
    """An argument of a pipeline's call as plain data for JSON; tensors, images and generators by a digest.

    Of an object that is none of these the text: where that holds an address, no other run has the same.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else repr(value)
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} {digest(value)[:16]}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {digest(value)[:16]}"
    if isinstance(value, torch.Generator):
        return f"generator {digest(value.get_state())[:16]}"
    if isinstance(value, Mapping):
        return {str(name): describe(item) for name, item in value.items()}
    if isinstance(value, Set):
        return sorted(map(str, map(describe, value)))
    if isinstance(value, Sequence):
        return [describe(item) for item in value]
    if hasattr(value, "tobytes") and hasattr(value, "mode") and hasattr(value, "size"):  # a PIL image
        return f"image {value.mode} {value.size} {digest(value)[:16]}"
    if inspect.isroutine(value) or inspect.isclass(value):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value)


def describe_pipeline(pipe: Any) -> dict[str, Any]:
    """A pipeline: classes, settings, scheduler, and the weights of all its models."""
    models = {name: model for name, model in pipe.components.items() if isinstance(model, nn.Module)}
    return {
        "class": type(pipe).__name__,
        "settings": _settings(pipe),
        "scheduler": {
            "class": type(pipe.scheduler).__name__,
            **_settings(pipe.scheduler),
            # What was set since the scheduler was built is not in its config.
            **({"shift": describe(pipe.scheduler.shift)} if hasattr(pipe.scheduler, "shift") else {}),
        },
        **{name: _describe_model(getattr(model, "_orig_mod", model)) for name, model in models.items()},
    }


def _settings(component: Any) -> dict[str, Any]:
    config = dict(getattr(component, "config", {}))
    return {name: describe(value) for name, value in sorted(config.items()) if not name.startswith("_")}


def _describe_model(model: nn.Module) -> dict[str, Any]:
    """Class, dtypes, a digest of values, and which LoRA layers act how strongly."""
    stored = stored_parameters(model)
    sums = hashlib.sha256()
    for name, weight in stored.items():
        sums.update(f"{plain_name(name)} {tuple(weight.shape)}".encode())
        try:
            sums.update(_bytes(pick(weight.read(), VALUES)))
        except (UnreadableWeight, RuntimeError):  # an unknown kind of tensor may not be indexed
            sums.update(b"unreadable")
    return {
        "class": type(model).__name__,
        "dtypes": sorted({str(weight.dtype).removeprefix("torch.") for weight in stored.values()}),
        "loras": _describe_loras(model),
        "weights": sums.hexdigest()[:16],
    }


def _describe_loras(model: nn.Module) -> list[str]:
    found = set()
    layers: list[Any] = [layer for layer in model.modules() if hasattr(layer, "base_layer")]
    for layer in layers:
        if hasattr(layer, "merged_adapters"):
            names = [] if layer.disable_adapters else layer.active_adapters
            for name in {*names, *layer.merged_adapters}:
                fused = " fused" if name in layer.merged_adapters else ""
                found.add(f"{name} {getattr(layer, 'scaling', {}).get(name)}{fused}")
    return sorted(found)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
