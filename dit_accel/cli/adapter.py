"""The adapter that a command loads: found, and found whole, before the model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..patches.handle import PatchHandle
    from ..pipelines.builtin import Builtin
    from ..recipe import Recipe

# What reading a file of another shape raises.
DAMAGE = (KeyError, IndexError, TypeError, AttributeError, ArithmeticError)


def find_adapter(name_or_path: str, builtin: Builtin | None) -> Path:
    """The folder of an adapter: one that comes with a built-in model, or the user's own.

    Raises:
        ValueError: there is none.
    """
    offered = {} if builtin is None else builtin.adapters
    if name_or_path in offered:
        return offered[name_or_path]
    folder = Path(name_or_path)
    if not folder.is_dir():
        known = f"the model's own are {', '.join(offered)}" if offered else "the model comes with none"
        raise ValueError(f"There is no adapter {name_or_path!r}: it is no folder, and {known}.")
    return folder


def adapter_recipe(folder: Path) -> Recipe:
    """The recipe of an adapter, whose card and tensors are looked at without the model.

    Raises:
        ValueError: they are missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    from ..patches.fingerprint import Fingerprint
    from ..recipe import Recipe
    from ..training.adapter import CARD, TENSORS

    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        with safe_open(folder / TENSORS, framework="pt") as file:
            file.keys()
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no readable adapter ({CARD} and {TENSORS}): {error}.") from error
    if not isinstance(card, dict):
        raise ValueError(f"{folder / CARD} is damaged: it is a {type(card).__name__}, not an object.")
    try:
        parts = [Fingerprint.from_dict(part) for part in card["base"].values()]
        recipe = Recipe.from_dict(card["recipe"])
        if not parts or not isinstance(card["backbone"], str) or not isinstance(card["lora"], dict):
            raise TypeError("base, backbone or lora is of another kind")
    except KeyError as error:
        raise ValueError(f"{folder / CARD} is damaged: it lacks {error}.") from error
    except (*DAMAGE, ValueError) as error:
        raise ValueError(f"{folder / CARD} is damaged: {error}") from error
    return recipe


def load_whole_adapter(pipe: Any, folder: Path, backend: str) -> PatchHandle:
    """Load an adapter whose tensors may not be those of its card.

    Raises:
        ValueError: it is damaged, or does not fit.
    """
    from ..training.adapter import load_adapter

    try:
        return load_adapter(pipe, folder, backend=backend)
    except DAMAGE as error:
        raise ValueError(f"The adapter in {folder} is damaged: {type(error).__name__} {error}.") from error
