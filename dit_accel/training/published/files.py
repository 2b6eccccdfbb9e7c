"""The files of a published checkpoint: of a path, or of a repository on the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..adapter_files import CARD, TENSORS

PICKLED = (".pth", ".pt", ".ckpt", ".bin")
INDEX = ".safetensors.index.json"
TRANSFORMERS = ("transformer", "transformer_2")
_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:/(.+))?")
# Of a whole pipeline the transformers alone; of LoRAs the name that diffusers gives them.
_WANTED = (
    "adapter.json",
    "adapter.safetensors",
    "transformer/*",
    "transformer_2/*",
    "pytorch_lora_weights.safetensors",
)


def find_checkpoint(path_or_repo: str | Path) -> Path:
    """A local file or folder; a repository's is downloaded, or found in the hub's cache.

    Args:
        path_or_repo: a path, ``owner/name``, or ``owner/name/path/in/it.safetensors``.

    Raises:
        ValueError: there is no such file, or it cannot be had.
    """
    path = Path(path_or_repo)
    if path.exists():
        return path
    repository = _REPOSITORY.fullmatch(str(path_or_repo))
    if repository is None:
        raise ValueError(f"There is no adapter or checkpoint at {path_or_repo}.")
    from huggingface_hub import hf_hub_download, snapshot_download

    owner_and_name, inside = repository.groups()
    try:
        if inside is not None:
            return Path(hf_hub_download(owner_and_name, inside))
        return Path(snapshot_download(owner_and_name, allow_patterns=list(_WANTED)))
    except Exception as error:  # the hub's errors share no class
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(f"There is no {path_or_repo} here, and it cannot be had from the hub: {reason}.") from error


def is_own(path: Path) -> bool:
    """Whether it is an adapter of this package."""
    named = (path / CARD).exists() or (path / TENSORS).exists()
    return path.is_dir() and (named or not any(_weights(path, inside) for inside in ("", *TRANSFORMERS)))


def refuse_unreadable(path: Path) -> None:
    """Look at the files of a checkpoint before a model is loaded for it: at names, and at the heads of safetensors.

    Raises:
        ValueError: it is no file with weights, or a damaged one.
    """
    files = [path] if path.is_file() else [file for inside in ("", *TRANSFORMERS) for file in _weights(path, inside)]
    for file in files:
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt"):
                    pass
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{file} cannot be read: {str(error).splitlines()[0]}.") from error
        elif file.suffix not in PICKLED:
            kinds = ", ".join((".safetensors", *PICKLED))
            raise ValueError(f"{file} is no checkpoint: the name of one ends in {kinds}.")


def read_parts(path: Path) -> dict[str | None, dict[str, torch.Tensor]]:
    """Tensors by the transformer that they are for, None where the file does not say.

    Raises:
        ValueError: no file with weights, several that are not shards of one, or one that cannot be read.
    """
    if path.is_file():
        return {None: _read(path)}
    found: dict[str | None, dict[str, torch.Tensor]] = {}
    for name in TRANSFORMERS:
        if files := _weights(path, name):
            found[name] = _read_all(path / name, files)
    if not found:
        found[None] = _read_all(path, _weights(path, ""))
    return found


def _weights(folder: Path, inside: str) -> list[Path]:
    place = folder / inside
    return sorted(file for file in place.glob("*") if file.suffix in (".safetensors", *PICKLED))


def _read_all(folder: Path, files: list[Path]) -> dict[str, torch.Tensor]:
    index = sorted(folder.glob(f"*{INDEX}"))
    if len(files) > 1 and len(index) != 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{folder} holds several checkpoints, give the path of one: {names}.")
    if len(files) > 1:
        try:
            shards = sorted(set(json.loads(index[0].read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index[0]} names no shards: {error}.") from error
        files = [folder / shard for shard in shards]
    merged: dict[str, torch.Tensor] = {}
    for file in files:
        merged |= _read(file)
    return merged


def _read(file: Path) -> dict[str, torch.Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, ValueError, RuntimeError, SafetensorError, EOFError, KeyError) as error:
        raise ValueError(f"{file} cannot be read: {str(error).splitlines()[0] if str(error) else error!r}.") from error
    except Exception as error:  # of pickle, whose errors share no class
        raise ValueError(f"{file} cannot be read safely as tensors alone: {type(error).__name__}.") from error
    for name in ("state_dict", "model", "module"):
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    tensors = {key: value for key, value in dict(state).items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ValueError(f"{file} holds no tensors by name.")
    return tensors
