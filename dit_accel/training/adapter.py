"""Adapters: what a fine-tuning learned, saved apart from the model it belongs to."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..api import handle_of, patch, self_attentions, transformers_of
from ..patches.fingerprint import Fingerprint, base_parameters
from ..patches.handle import PatchHandle
from ..patches.learned import is_learned
from ..recipe import Recipe

CARD, TENSORS = "adapter.json", "adapter.safetensors"
FORMAT = 1
BACKBONES = ("none", "full", "delta", "lora")
# Not the name of the learned modules: parameter names hold both.
LORA_NAME = "dit_accel_lora"


@dataclass(frozen=True, eq=False)
class _Part:
    """One transformer's share of an adapter."""

    name: str
    model: Any
    attentions: dict[str, nn.Module]


def save_adapter(
    pipe: Any,
    folder: str | Path,
    *,
    transformer: str | None = None,
    backbone: str = "none",
    trained: Iterable[str] = (),
    base: Mapping[str, torch.Tensor] | None = None,
    values: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
    summary: Mapping[str, Any] | None = None,
) -> Path:
    """Save what was trained: a recipe's learned parameters, and changed weights of the model.

    The folder gets ``adapter.safetensors`` and a card, ``adapter.json``: recipe, fingerprint of the model,
    training summary.

    Args:
        pipe: a patched pipeline or transformer.
        folder: made if needed.
        transformer: the one of the pipeline to save, "transformer" or "transformer_2"; None saves all.
        backbone: what is saved of the model's own weights: "none"; "full", the ``trained`` parameters;
            "delta", their difference to ``base``; "lora", the LoRA layers that are in the model (peft).
        trained: names of the changed parameters, as ``named_parameters`` of the transformer has them.
        base: their values before the training, for "delta".
        values: parameters to save in place of the model's present ones, by name, e.g. averaged ones.
        dtype: of the saved backbone tensors; None keeps theirs. ``torch.int8`` stores the matrices of a delta as
            integers with one float32 scale a row, half of what bfloat16 takes. Learned parameters stay as they are.
        summary: of the training, plain data, kept in the card.

    Returns:
        The folder.

    Raises:
        ValueError: the pipeline is not patched, or the arguments do not fit together.
    """
    if backbone not in BACKBONES:
        raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {backbone!r}.")
    if dtype == torch.int8 and backbone != "delta":
        raise ValueError(f"dtype int8 is for backbone 'delta', got {backbone!r}.")
    handle, parts, trained = handle_of(pipe), _parts(pipe), list(trained)
    if transformer is not None and len(parts) > 1:
        found = [part.name for part in parts]
        parts = [part for part in parts if part.name == transformer]
        if not parts:
            raise ValueError(f"{type(pipe).__name__} has no {transformer!r}; it has {', '.join(found)}.")
    if len(parts) > 1 and (trained or values):
        raise ValueError(f"Trained weights are of one transformer, name it; the pipeline has {len(parts)}.")
    missing = [name for name in trained if backbone == "delta" and name not in (base or {})]
    if missing:
        raise ValueError(f"backbone 'delta' needs the base values of all trained parameters; {missing[0]} is missing.")
    tensors: dict[str, torch.Tensor] = {}
    fingerprints: dict[str, Any] = {}
    lora: dict[str, Any] = {}
    for part in parts:
        present = dict(part.model.named_parameters()) | dict(values or {})
        unknown = [name for name in trained if name not in present]
        if unknown:
            raise ValueError(f"{type(part.model).__name__} has no parameter {unknown[0]}.")
        saved = {f"learned/{n}": v for n, v in present.items() if is_learned(n)}
        if backbone in ("full", "delta"):
            for name in trained:
                value = present[name].detach()
                if backbone == "delta":
                    value = value.float() - (base or {})[name].detach().to(value.device).float()
                if dtype == torch.int8 and value.dim() > 1:
                    value, saved[f"scale/{name}"] = _to_integers(value)
                elif dtype is not None and dtype != torch.int8:
                    value = value.to(dtype)
                saved[f"{backbone}/{name}"] = value
        elif backbone == "lora":
            state, lora[part.name] = _lora_state(part.model, present)
            saved |= {f"lora/{n}": v if dtype is None else v.to(dtype) for n, v in state.items()}
        tensors |= {f"{part.name}/{n}": v.detach().cpu().contiguous().clone() for n, v in saved.items()}
        fingerprint = Fingerprint.of(part.model, part.attentions, trained, base, values)
        fingerprints[part.name] = fingerprint.to_dict()
    from .. import __version__

    card = {
        "format": FORMAT,
        "dit_accel": __version__,
        "recipe": handle.recipe.to_dict(),
        "base": fingerprints,
        "backbone": backbone,
        "lora": lora,
        "training": dict(summary or {}),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / TENSORS)
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n")
    return folder


def load_adapter(pipe: Any, folder: str | Path, *, backend: str = "auto") -> PatchHandle:
    """Put an adapter into a pipeline: patch it with the adapter's recipe, and load what was trained.

    A pipeline that is patched already must have the adapter's recipe. Removing the patch also takes the
    adapter out: changed weights come back as the tensors they were.

    Args:
        pipe: the pipeline or transformer that the adapter was trained on.
        folder: written by :func:`save_adapter`.
        backend: see :func:`~dit_accel.patch`; for a pipeline that is not patched yet.

    Raises:
        ValueError: not an adapter, or one for another model, recipe or head count; the message names what
            differs. Nothing has been touched then.
    """
    card, tensors = _read(Path(folder))
    parts = _parts(pipe)
    names = list(card["base"])
    if len(parts) == len(names) == 1:
        parts = [_Part(names[0], parts[0].model, parts[0].attentions)]
    if missing := set(names) - {part.name for part in parts}:
        raise ValueError(
            f"The adapter in {folder} is for the transformers {', '.join(names)}, the pipeline has "
            f"{', '.join(part.name for part in parts)}, not {', '.join(sorted(missing))}."
        )
    # Of two experts each may have an adapter of its own; they are loaded one after the other.
    parts = [part for part in parts if part.name in names]
    for part in parts:
        difference = Fingerprint.from_dict(card["base"][part.name]).difference(part.model, part.attentions)
        if difference is not None:
            raise ValueError(f"The adapter in {folder} does not fit {type(part.model).__name__}: {difference}.")
    recipe = Recipe.from_dict(card["recipe"])
    try:
        handle, patched_here = handle_of(pipe), False
    except ValueError:
        handle, patched_here = patch(pipe, recipe, backend=backend), True
    try:
        if handle.recipe != recipe:
            raise ValueError(
                f"The adapter in {folder} is for another recipe: {_first_difference(recipe, handle.recipe)}."
            )
        loads = [_plan_load(part, tensors, card, folder) for part in parts]
        for load in loads:
            load(handle)
    except BaseException:
        if patched_here:
            handle.remove()
        raise
    return handle


def _parts(pipe: Any) -> list[_Part]:
    return [
        _Part(name or "transformer", model, dict(self_attentions(model, family)))
        for name, model, family in transformers_of(pipe)
    ]


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        card = json.loads((folder / CARD).read_text())
        with safe_open(folder / TENSORS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no readable adapter ({CARD} and {TENSORS}): {error}") from error
    if card.get("format") != FORMAT:
        raise ValueError(f"The adapter in {folder} has format {card.get('format')}, this version reads {FORMAT}.")
    return card, tensors


def _first_difference(wanted: Recipe, got: Recipe) -> str:
    mine, its = wanted.to_dict(), got.to_dict()
    for axis, fields in mine.items():
        for name, value in fields.items():
            if its[axis].get(name, "absent") != value:
                return f"{axis}.{name} is {value!r} there and {its[axis].get(name, 'absent')!r} in the pipeline"
    return "the recipes differ"


def _plan_load(
    part: _Part, tensors: Mapping[str, torch.Tensor], card: Mapping[str, Any], folder: str | Path
) -> Callable[[PatchHandle], None]:
    """Check one transformer's tensors; the result puts them in."""
    mine = {n.removeprefix(f"{part.name}/"): v for n, v in tensors.items() if n.startswith(f"{part.name}/")}
    present = dict(part.model.named_parameters())
    own = base_parameters(part.model)
    learned = {n.removeprefix("learned/"): v for n, v in mine.items() if n.startswith("learned/")}
    changed = {n.split("/", 1)[1]: v for n, v in mine.items() if n.startswith(("full/", "delta/"))}
    for name, scale in ((n.removeprefix("scale/"), v) for n, v in mine.items() if n.startswith("scale/")):
        changed[name] = changed[name].float() * scale.view(-1, *[1] * (changed[name].dim() - 1))
    wanted = {name for name in present if is_learned(name)}
    if wanted != set(learned):
        odd = sorted(wanted ^ set(learned))[0]
        raise ValueError(f"The adapter in {folder} and the recipe's parameters differ: {odd}.")
    for name, value in (learned | changed).items():
        target = present.get(name, own.get(name))
        if target is None or target.shape != value.shape:
            spelled = "is missing" if target is None else f"has shape {tuple(target.shape)}"
            raise ValueError(f"In the adapter {name} has shape {tuple(value.shape)}; in the model it {spelled}.")

    def load(handle: PatchHandle) -> None:
        with torch.no_grad():
            for name, value in learned.items():
                present[name].copy_(value)
            for name, value in changed.items():
                target = own[name]
                value = value.to(target.device, torch.float32)
                new = target.float() + value if card["backbone"] == "delta" else value
                handle.record(_swap(target, new.to(target.dtype)))
        if card["backbone"] == "lora":
            state = {n.removeprefix("lora/"): v for n, v in mine.items() if n.startswith("lora/")}
            handle.record(_load_lora(part.model, state, card["lora"][part.name]))

    return load


def _to_integers(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 of the same shape, and float32 scales of its first dimension: their product is near the value."""
    scale = value.flatten(1).abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (value / scale.view(-1, *[1] * (value.dim() - 1))).round().to(torch.int8), scale


def _swap(target: torch.Tensor, value: torch.Tensor) -> Callable[[], None]:
    """Give a parameter other data. Returns the undo, which brings back the very tensor."""
    before = target.data
    target.data = value

    def undo() -> None:
        target.data = before

    return undo


def add_lora(model: Any, target_modules: Collection[str], rank: int, alpha: int) -> Callable[[], None]:
    """LoRA layers (peft) around linear layers of a diffusers transformer. Returns the undo.

    Args:
        target_modules: full paths of the layers.
    """
    from peft import LoraConfig

    others = list(getattr(model, "peft_config", {}))
    active = model.active_adapters() if others else []
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(target_modules)), adapter_name=LORA_NAME
    )
    if active:
        model.set_adapter([*active, LORA_NAME])

    def undo() -> None:
        if others:
            model.delete_adapters(LORA_NAME)
        else:
            model.unload_lora()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags.get(name, parameter.requires_grad))

    return undo


def _lora_state(model: Any, present: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from peft import get_peft_model_state_dict

    configs = getattr(model, "peft_config", {})
    if not configs:
        raise ValueError(f"backbone 'lora' needs LoRA layers (peft) in {type(model).__name__}; it has none.")
    name = LORA_NAME if LORA_NAME in configs else next(iter(configs))
    config = configs[name]
    state = get_peft_model_state_dict(model, state_dict=dict(present), adapter_name=name)
    return state, {
        "rank": config.r,
        "alpha": config.lora_alpha,
        "target_modules": sorted(config.target_modules),
    }


def _load_lora(model: Any, state: dict[str, torch.Tensor], settings: Mapping[str, Any]) -> Callable[[], None]:
    from peft import set_peft_model_state_dict

    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    undo = add_lora(model, settings["target_modules"], settings["rank"], settings["alpha"])
    set_peft_model_state_dict(model, state, adapter_name=LORA_NAME)
    for name, parameter in model.named_parameters():
        plain = name.replace(".base_layer.", ".")
        parameter.requires_grad_(flags.get(plain, False))
    return undo
