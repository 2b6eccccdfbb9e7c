"""What a patch takes: the transformers of a pipeline, their self-attentions, and the handle of one that is patched."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from .families import EXCLUDED, FAMILIES, Family, control_family_of, family_of
from .families.general import EXAMPLE, general_family
from .handle import PatchHandle
from .hooks import PublishLatents


def transformers_of(target: Any) -> list[tuple[str, nn.Module, Family]]:
    """Name, module and family of every transformer of a pipeline, or of the one given, to patch."""
    if isinstance(target, nn.Module):
        components: Mapping[str, Any] = {"": target}
    elif hasattr(target, "components"):
        components = target.components
    else:
        raise ValueError(f"patch takes a diffusers pipeline or transformer, got {type(target).__name__}.")
    models = {name: _unwrap(value) for name, value in components.items() if isinstance(value, nn.Module)}
    found = [(name, model, family) for name, model in models.items() if (family := family_of(model))]
    if not found and isinstance(target, nn.Module) and (family := control_family_of(models[""])):
        found = [("", models[""], family)]
    if found:
        return found
    candidates = {n: m for n, m in models.items() if n == "" or n.startswith(("transformer", "unet"))}
    for model in candidates.values():
        kind = type(model).__name__
        if kind in EXCLUDED:
            raise ValueError(f"{kind} cannot be patched. {EXCLUDED[kind]}")
    if not candidates:
        known = ", ".join(family.name for family in FAMILIES)
        raise ValueError(f"{type(target).__name__} has no transformer. Known families: {known}.")
    try:
        return [(name, model, general_family(model)) for name, model in candidates.items()]
    except ValueError as error:
        raise ValueError(
            f"{error} `dit-accel info` lists the known ones; a family of your own is declared so:\n{EXAMPLE}"
        ) from error


def controls_of(target: Any) -> list[tuple[str, nn.Module, Family]]:
    """Name, module and family of every control network of a pipeline, also of several in one."""
    found = []
    for name, value in getattr(target, "components", {}).items():
        whole = _unwrap(value)
        several = getattr(whole, "nets", None)
        parts = {f"{name}.nets.{n}": one for n, one in enumerate(several)} if isinstance(several, nn.ModuleList) else {}
        for path, part in (parts or {name: whole}).items():
            model = _unwrap(part)
            if isinstance(model, nn.Module) and (family := control_family_of(model)):
                found.append((path, model, family))
    return found


def _unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper."""
    return getattr(model, "_orig_mod", model)


def self_attentions(model: nn.Module, family: Family) -> Iterator[tuple[str, Any]]:
    """Path and module of every self-attention that a patch would take."""
    for path, module in model.named_modules():
        if family.has_self_attention(path) and hasattr(module, "processor"):
            yield path, module


def other_attentions(model: nn.Module, family: Family) -> tuple[str, ...]:
    """Paths of what else attends, a number in a path as *: to a prompt, in windows, over text or sound, linearly."""
    paths = [path for path, module in model.named_modules() if path and hasattr(module, "processor")]
    others = (path for path in paths if not family.has_self_attention(path))
    return tuple(dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", path) for path in others))


def repeated_blocks(model: nn.Module, family: Family | None = None) -> list[nn.Module]:
    """What diffusers' ``compile_repeated_blocks`` compiles, or where a class names nothing, all blocks that attend."""
    names = getattr(model, "_repeated_blocks", None)
    if names:
        return [module for module in model.modules() if type(module).__name__ in names]
    return attending_blocks(model, family)


def attending_blocks(model: nn.Module, family: Family | None = None) -> list[nn.Module]:
    """The blocks whose self-attention a patch would take, in their order."""
    family = family or family_of(model)
    assert family is not None
    owners = [path.rpartition(".")[0] for path, _ in model.named_modules() if family.has_self_attention(path)]
    return [model.get_submodule(path) for path in dict.fromkeys(owners)]


def handle_of(target: Any) -> PatchHandle:
    """The handle of a patched pipeline or transformer.

    Raises:
        ValueError: it is not patched.
    """
    for _, model, _ in transformers_of(target):
        if (hook := root_hook(model)) is not None:
            return hook.handle
    raise ValueError(f"{type(target).__name__} is not patched.")


def root_hook(model: nn.Module) -> PublishLatents | None:
    """The hook by which a transformer is known to be patched, which holds its handle; None if it is not."""
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, PublishLatents):
            return hook
    return None
