"""The folder of an adapter: tensors and a card, written whole, and read with every fault named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..files import written_whole
from ..names import MissingName
from ..patches.fingerprint import Fingerprint
from ..recipe import Recipe
from ..tensor_files import save_tensors
from .few_steps import FewSteps
from .lora import LoraSettings

CARD, TENSORS = "adapter.json", "adapter.safetensors"
FORMAT = 1
BACKBONES = ("none", "full", "delta", "lora")
# What a tensor is: a recipe's parameter, or by backbone a weight, a change of one, a layer beside one.
KINDS = {"none": (), "full": ("full",), "delta": ("delta", "scale"), "lora": ("lora", "delta", "scale")}


@dataclass(frozen=True, eq=False)
class AdapterFiles:
    """An adapter as it was read.

    Attributes:
        folder: where from.
        recipe: that it was trained with.
        base: fingerprints of the transformers it was trained on, by name.
        backbone: what it holds of the model's own weights; see :func:`~dit_accel.save_adapter`.
        lora: settings of the LoRA layers of each transformer.
        tensors: by transformer, kind and name.
        steps: that it was distilled to; None where it runs at any.
    """

    folder: Path
    recipe: Recipe
    base: Mapping[str, Fingerprint]
    backbone: str
    lora: Mapping[str, LoraSettings]
    tensors: Mapping[str, Mapping[str, Mapping[str, torch.Tensor]]]
    steps: FewSteps | None = None

    def of_kind(self, part: str, kind: str) -> Mapping[str, torch.Tensor]:
        """Tensors of one transformer and kind, by name."""
        return self.tensors.get(part, {}).get(kind, {})


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], card: Mapping[str, Any]) -> None:
    """Write the two files; those that were there are replaced when both are written.

    Raises:
        ValueError: they cannot be written.
    """
    with written_whole(folder / TENSORS) as tensors_draft, written_whole(folder / CARD) as card_draft:
        save_tensors(tensors_draft, tensors)
        card_draft.write_text(json.dumps({"format": FORMAT, **card}, indent=2) + "\n", encoding="utf-8")


def read_adapter(folder: Path) -> AdapterFiles:
    """Read a folder, and check all that can be checked without the model.

    Raises:
        ValueError: it is no adapter, or a damaged one; the message names the fault.
    """
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        with safe_open(folder / TENSORS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no readable adapter ({CARD} and {TENSORS}): {error}.") from error
    if not isinstance(card, dict):
        raise ValueError(f"The adapter in {folder} is damaged: {CARD} holds a {type(card).__name__}, not an object.")
    if card.get("format") != FORMAT:
        raise ValueError(f"The adapter in {folder} has format {card.get('format')!r}, this version reads {FORMAT}.")
    try:
        return _read(folder, card, tensors)
    except MissingName as error:
        raise MissingName(f"The adapter in {folder} is of a recipe that is not at hand: {error}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"The adapter in {folder} is damaged: {str(error).rstrip('.')}.") from error


def to_integers(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 of the same shape, and float32 scales of its first dimension: their product is near the value."""
    scale = value.flatten(1).abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (value / _along_rows(scale, value)).round().to(torch.int8), scale


def from_integers(value: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What :func:`to_integers` was given, float32, to half a step of each scale."""
    return value.float() * _along_rows(scale, value)


def _along_rows(scale: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return scale.view(-1, *[1] * (value.dim() - 1))


def _read(folder: Path, card: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> AdapterFiles:
    for name, kind in (("recipe", dict), ("base", dict), ("backbone", str)):
        if not isinstance(card.get(name), kind):
            spelled = f"has no {name}" if name not in card else f"has a {name} of type {type(card[name]).__name__}"
            raise ValueError(f"{CARD} {spelled}")
    backbone = card["backbone"]
    if backbone not in BACKBONES:
        raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {backbone!r}")
    if not card["base"]:
        raise ValueError(f"{CARD} names no transformer")
    base = {name: Fingerprint.from_dict(data) for name, data in card["base"].items()}
    lora = {}
    if backbone == "lora":
        lora = {name: LoraSettings.from_dict(dict(card.get("lora") or {}).get(name)) for name in base}
    steps = None if card.get("steps") is None else FewSteps.from_dict(card["steps"])
    recipe = Recipe.from_dict(card["recipe"])
    files = AdapterFiles(folder, recipe, base, backbone, lora, _sort(tensors, base, backbone), steps)
    for part in base:
        _check_integers(files.of_kind(part, "delta"), files.of_kind(part, "scale"))
    return files


def _sort(
    tensors: Mapping[str, torch.Tensor], base: Mapping[str, Any], backbone: str
) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    kinds = ("learned", *KINDS[backbone])
    found: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for full_name, value in tensors.items():
        part, _, rest = full_name.partition("/")
        kind, _, name = rest.partition("/")
        if part not in base or kind not in kinds or not name:
            raise ValueError(
                f"tensor {full_name} belongs to none of its transformers ({', '.join(base)}) and kinds "
                f"({', '.join(kinds)})"
            )
        found.setdefault(part, {}).setdefault(kind, {})[name] = value
    return found


def _check_integers(values: Mapping[str, torch.Tensor], scales: Mapping[str, torch.Tensor]) -> None:
    for name in sorted({*scales, *(name for name, value in values.items() if value.dtype == torch.int8)}):
        if name not in values or name not in scales:
            raise ValueError(f"{name} has integers or scales, but not both")
        if scales[name].shape != values[name].shape[:1]:
            raise ValueError(f"{name} has {tuple(values[name].shape)} integers and {tuple(scales[name].shape)} scales")
