"""Exact, resumable checkpoints in files of at most 16 MiB."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SHARD_BYTES = 15 * 2**20


def save_tensors(tensors: dict[str, torch.Tensor], folder: Path, name: str) -> None:
    """Writes `<name>-00000.safetensors`, ... with whole tensors up to `SHARD_BYTES` a file; old shards go."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{name}-*.safetensors"):
        old.unlink()
    shards: list[dict[str, torch.Tensor]] = [{}]
    used = 0
    for key, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and used + size > SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][key] = tensor.detach().contiguous().cpu()
        used += size
    for index, shard in enumerate(shards):
        save_file(shard, folder / f"{name}-{index:05d}.safetensors")


def load_tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Reads what `save_tensors` wrote.

    Raises:
        FileNotFoundError: when the folder holds no such shards.
    """
    files = sorted(folder.glob(f"{name}-*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no {name}-*.safetensors in {folder}")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors.update(load_file(file))
    return tensors


def flatten_state(state: dict[str, Any], prefix: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Splits an optimizer's state dict into tensors and JSON."""
    tensors: dict[str, torch.Tensor] = {}
    rest: dict[str, Any] = {"param_groups": state["param_groups"], "scalars": {}}
    for index, entry in state["state"].items():
        for key, value in entry.items():
            if torch.is_tensor(value):
                tensors[f"{prefix}.{index}.{key}"] = value
            else:
                rest["scalars"][f"{index}.{key}"] = value
    return tensors, rest


def unflatten_state(tensors: dict[str, torch.Tensor], rest: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The inverse of `flatten_state`."""
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix + "."):
            _, index, key = name.rsplit(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    for name, value in rest["scalars"].items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    return {"state": state, "param_groups": rest["param_groups"]}


def random_state(rng: random.Random, generators: dict[str, torch.Generator]) -> dict[str, Any]:
    """JSON form of a Python generator and torch generators."""
    version, numbers, gauss = rng.getstate()
    return {
        "python": [version, list(numbers), gauss],
        "torch": {name: g.get_state().tolist() for name, g in generators.items()},
    }


def restore_random_state(state: dict[str, Any], rng: random.Random, generators: dict[str, torch.Generator]) -> None:
    """Puts back what `random_state` saved."""
    version, numbers, gauss = state["python"]
    rng.setstate((version, tuple(numbers), gauss))
    for name, generator in generators.items():
        generator.set_state(torch.tensor(state["torch"][name], dtype=torch.uint8))


def save_json(path: Path, value: dict[str, Any]) -> None:
    """Writes JSON through a temporary file, so that a killed run leaves the old one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)
