"""LoRA layers (peft) of an adapter: put into a diffusers transformer and taken out, beside others and fused ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..patches.offloading import execution_device, join_offloading
from ..patches.weights import FUSED, is_plain_lora, lora_product, plain_name, weights_of

# Not the name of the learned modules: parameter names hold both.
LORA_NAME = "dit_accel_lora"
UNUSED_WHEN_FUSED = {part for parts in FUSED.values() for part in parts}


@dataclass(frozen=True)
class LoraSettings:
    """What the LoRA layers of one transformer are.

    Attributes:
        rank, alpha: their product is scaled by ``alpha / rank``.
        target_modules: full paths of the linear layers.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...]

    @classmethod
    def from_dict(cls, data: Any) -> LoraSettings:
        """From plain data.

        Raises:
            ValueError: it is something else; the message ends a sentence.
        """
        known = data if isinstance(data, dict) else {}
        rank, alpha, targets = known.get("rank"), known.get("alpha"), known.get("target_modules")
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
            raise ValueError(f"lora needs rank, alpha and target_modules, got {data!r}")
        if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
            raise ValueError(f"lora needs rank, alpha and target_modules, got {data!r}")
        return cls(rank, alpha, tuple(targets))


def add_lora(
    model: Any, target_modules: Collection[str], rank: int, alpha: float, fuse_again: bool = True
) -> Callable[[], None]:
    """LoRA layers around linear layers of a diffusers transformer. Returns the undo.

    LoRAs that are active stay so. Fused ones are taken out, since a layer with a fused LoRA computes with no other.

    Args:
        target_modules: full paths of the layers, also of those that are inside a LoRA's.
        fuse_again: whether the undo fuses what was taken out.
    """
    from peft import LoraConfig

    before = [layer for _, layer in _peft_layers(model)]
    disabled = [layer for layer in before if layer.disable_adapters]
    earlier = {layer: list(layer.active_adapters) for layer in disabled}
    active = model.active_adapters() if before and not disabled else []
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    taken_out = _take_out(model)
    for layer in disabled:
        layer._disable_adapters = False
    targets = _beside_others(model, target_modules)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)  # type: ignore[arg-type]
    model.add_adapter(config, adapter_name=LORA_NAME)
    if active:
        model.set_adapter([*active, LORA_NAME])

    def undo() -> None:
        fused = _take_out(model, LORA_NAME)
        _remove(model, earlier)
        _fuse(model, {layer: [name for name in names if name != LORA_NAME] for layer, names in fused.items()})
        if fuse_again:
            _fuse(model, taken_out)
        for layer in disabled:
            layer._disable_adapters = True
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags.get(name, parameter.requires_grad))

    return undo


def load_lora(model: Any, state: Mapping[str, torch.Tensor], settings: LoraSettings) -> Callable[[], None]:
    """Add saved LoRA layers, fused where others are. Returns the undo.

    Args:
        state: of :func:`lora_state`.
    """
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    paths = {plain_name(path): path for path, _ in model.named_modules() if not path.endswith(".base_layer")}
    fused = {layer: list(layer.merged_adapters) for _, layer in _peft_layers(model) if layer.merged_adapters}
    undo = [add_lora(model, [paths[path] for path in settings.target_modules], settings.rank, settings.alpha, False)]
    try:
        for path, layer in _peft_layers(model):
            if LORA_NAME in layer.lora_A:
                for half, new in (("lora_A", layer.lora_A[LORA_NAME]), ("lora_B", layer.lora_B[LORA_NAME])):
                    _fill(model, layer, new, state[f"{plain_name(path)}.{half}.weight"])
                    undo.append(join_offloading(model, new))
        _fuse(model, {layer: [*names, LORA_NAME] for layer, names in fused.items()})
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags.get(plain_name(name), flags.get(name, False)))
    except BaseException:
        _run_backwards(undo)
        raise
    return partial(_run_backwards, undo)


def lora_parameters(model: nn.Module, adapter: str | None = None) -> set[str]:
    """Names of the parameters of LoRA layers, of one adapter or of all; those of the layers inside are none of them."""
    found = set()
    for path, layer in _peft_layers(model):
        for name, _ in layer.named_parameters():
            if not name.startswith("base_layer.") and (adapter is None or adapter in name.split(".")):
                found.add(f"{path}.{name}")
    return found


@contextmanager
def without_lora(model: nn.Module, adapter: str) -> Iterator[None]:
    """The model without one of its LoRAs; others stay as active as they are."""
    scales = {layer: layer.scaling[adapter] for _, layer in _peft_layers(model) if adapter in layer.lora_A}
    for layer in scales:
        layer.scaling[adapter] = 0.0
    try:
        yield
    finally:
        for layer, scale in scales.items():
            layer.scaling[adapter] = scale


def lora_state(model: Any, read: Callable[[str], torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Values of the LoRA layers in a model, and their settings as plain data.

    Args:
        read: gives the value of a parameter by its name.

    Raises:
        ValueError: there are none, or of a kind that is more than rank and alpha.
    """
    configs = getattr(model, "peft_config", {})
    if not configs:
        raise ValueError(f"backbone 'lora' needs LoRA layers (peft) in {type(model).__name__}; it has none.")
    name = LORA_NAME if LORA_NAME in configs else next(iter(configs))
    config = configs[name]
    for option in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias"):
        if getattr(config, option, None):
            raise ValueError(f"backbone 'lora' saves LoRA layers of one rank and scale, got {option} in {name!r}.")
    targets = [path for path, layer in _peft_layers(model) if name in layer.lora_A]
    state = {
        f"{plain_name(path)}.{half}.weight": read(f"{path}.{half}.{name}.weight")
        for path in targets
        for half in ("lora_A", "lora_B")
    }
    settings = {
        "rank": config.r,
        "alpha": config.lora_alpha,
        "target_modules": sorted(plain_name(path) for path in targets),
    }
    return state, settings


def why_not_lora(model: nn.Module, state: Mapping[str, torch.Tensor], settings: LoraSettings) -> str | None:
    """Why saved LoRA layers cannot be put into a model, as a sentence's end; None if they can."""
    if LORA_NAME in getattr(model, "peft_config", {}):
        return "the LoRA layers of an adapter are loaded already; take them out with handle.remove() first"
    for path, layer in _peft_layers(model):
        if not all(is_plain_lora(layer, name) for name in layer.merged_adapters):
            return f"an adapter that is no plain LoRA is fused into {plain_name(path)}; call unfuse_lora() first"
    layers = {plain_name(path): module for path, module in model.named_modules() if not path.endswith(".base_layer")}
    wanted = {f"{path}.lora_{half}.weight" for path in settings.target_modules for half in "AB"}
    if wanted != set(state):
        odd = sorted(wanted ^ set(state))[0]
        return f"{odd} is {'missing' if odd in wanted else 'of none of its target modules'}"
    for path in settings.target_modules:
        around = layers.get(path.rpartition(".")[0])
        if getattr(around, "fused_projections", False) and path.rpartition(".")[2] in UNUSED_WHEN_FUSED:
            return f"{path} is not computed with, its projections being fused; call unfuse_qkv_projections() first"
        linear: Any = layers.get(path)
        ends = (getattr(linear, "in_features", None), getattr(linear, "out_features", None))
        if None in ends:
            return f"the model has no linear layer {path}"
        for half, shape in (("A", (settings.rank, ends[0])), ("B", (ends[1], settings.rank))):
            found = tuple(state[f"{path}.lora_{half}.weight"].shape)
            if found != shape:
                return f"{path}.lora_{half}.weight has shape {found}, the model's layer takes {shape}"
    return None


def _beside_others(model: nn.Module, paths: Collection[str]) -> list[str]:
    """Paths of layers, in place of what other LoRAs have wrapped and of their own layers."""
    around = sorted((path for path, _ in _peft_layers(model)), key=len)
    return sorted({next((outer for outer in around if path.startswith(f"{outer}.")), path) for path in paths})


def _fill(model: nn.Module, layer: Any, new: Any, value: torch.Tensor) -> None:
    """Give a new LoRA layer its values, where it is computed and in a dtype that it can be computed in."""
    device = execution_device(model, layer.base_layer)
    if new.weight.device.type == "meta":  # peft puts it where the offloaded weight is
        new.to_empty(device=device or torch.device("cpu"))
    elif device is not None:
        new.to(device)
    if new.weight.dtype.itemsize == 1:
        new.to(value.dtype)
    new.weight.data.copy_(value)


def _take_out(model: nn.Module, adapter: str | None = None) -> dict[Any, list[str]]:
    """Take fused LoRAs out of the layers where there are any, or where ``adapter`` is one; what was fused where."""
    fused = {
        layer: list(layer.merged_adapters)
        for _, layer in _peft_layers(model)
        if (layer.merged_adapters if adapter is None else adapter in layer.merged_adapters)
    }
    _add_products(model, fused, -1)
    for layer in fused:
        layer.merged_adapters.clear()
    return fused


def _fuse(model: nn.Module, fused: Mapping[Any, Sequence[str]]) -> None:
    present = {layer: [name for name in names if name in layer.lora_A] for layer, names in fused.items()}
    _add_products(model, present, 1)
    for layer, names in present.items():
        layer.merged_adapters.extend(names)


def _add_products(model: nn.Module, fused: Mapping[Any, Sequence[str]], sign: int) -> None:
    # peft does it in place, in the model's dtype: not in eight bits, and not where weights are offloaded.
    if not fused:
        return
    paths, own = {layer: plain_name(path) for path, layer in _peft_layers(model)}, weights_of(model)
    for layer, names in fused.items():
        if names:
            weight = own[f"{paths[layer]}.weight"]
            before = weight.read()
            change = sum(lora_product(layer, name).to(before.device) for name in names)
            weight.write(before.float() + sign * change)


def _remove(model: Any, earlier: Mapping[Any, Sequence[str]]) -> None:
    """Delete the LoRA layers, and put what was in the place of those that are left without any there again.

    Args:
        earlier: adapters that were active in a layer, to be so again where no other is.
    """
    # diffusers' own calls also group an offloaded model anew, and then read weights on disk from the old files.
    for path, layer in list(_peft_layers(model)):
        if LORA_NAME in layer.active_adapters:
            others = [name for name in layer.active_adapters if name != LORA_NAME]
            layer.set_adapter(others or list(earlier.get(layer, ())))
        if LORA_NAME in layer.lora_A:
            layer.delete_adapter(LORA_NAME)
            if not len(layer.lora_A) and not len(layer.lora_embedding_A):
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, layer.base_layer)
    configs = getattr(model, "peft_config", {})
    configs.pop(LORA_NAME, None)
    if not configs:
        for name in ("peft_config", "_hf_peft_config_loaded"):
            vars(model).pop(name, None)


def _peft_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            yield path, module


def _run_backwards(steps: list[Callable[[], None]]) -> None:
    while steps:
        steps.pop()()
