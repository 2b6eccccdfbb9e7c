"""Where an offloaded parameter's values are: with accelerate's hooks, in diffusers' groups, or on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from safetensors import safe_open
from torch import nn


class UnreadableWeight(ValueError):
    """The values of a weight are out of reach; the message says why, as the end of a sentence."""


@dataclass(frozen=True, eq=False)
class Place:
    """One parameter of a module, and what offloads it.

    Attributes:
        owner, leaf: the module, and the parameter's name in it.
        offloaded: the map of an accelerate hook, and the parameter's key there.
        group: of diffusers' group offloading.
    """

    owner: nn.Module
    leaf: str
    offloaded: tuple[Mapping[str, torch.Tensor], str] | None
    group: Any

    @property
    def parameter(self) -> torch.Tensor:
        """What the module has now; only shape and dtype are sure to be the weight's own."""
        parameter = self.owner._parameters[self.leaf]
        assert parameter is not None
        return parameter

    @property
    def why_fixed(self) -> str | None:
        """Why other values cannot be put in, as the end of a sentence; None where they can."""
        if self._is_on_disk:
            return "is offloaded to disk in groups; load before that is enabled"
        if self.parameter.device.type != "meta":
            return None
        if self.offloaded is None:
            return "is on the meta device"
        store = _store(*self.offloaded)[0]
        return None if isinstance(store, MutableMapping) else f"is kept in a {type(store).__name__}"

    def read(self) -> torch.Tensor:
        """The values, in the dtype and on the device that they are stored in.

        Raises:
            UnreadableWeight: they are on the meta device, and no offloading hook holds them.
        """
        parameter = self.parameter
        if self._is_on_disk:
            # The parameter holds uninitialised memory meanwhile.
            with safe_open(self.group.safetensors_file_path, framework="pt") as file:
                return file.get_tensor(self.group.tensor_to_key[parameter])
        if parameter.device.type != "meta":
            return parameter.detach()
        if self.offloaded is None:
            raise UnreadableWeight("they are on the meta device, and no offloading hook holds their values")
        values, key = self.offloaded
        return values[key].detach()

    def write(self, value: torch.Tensor) -> None:
        """Put other values in, in the dtype and on the device of the present ones."""
        parameter = self.parameter
        if parameter.device.type == "meta" and self.offloaded is not None:
            _write_offloaded(*self.offloaded, value)
            return
        if self.group is not None and parameter in self.group.cpu_param_dict:
            # With streams this copy takes the parameter's place after every forward.
            before = self.group.cpu_param_dict[parameter]
            copy = value.to(before.device, before.dtype)
            self.group.cpu_param_dict[parameter] = copy.pin_memory() if before.is_pinned() else copy
        parameter.data = value.to(parameter.device, parameter.dtype)

    @property
    def _is_on_disk(self) -> bool:
        group = self.group
        if group is None or not group.offload_to_disk_path or not group._is_offloaded_to_disk:
            return False
        return self.parameter in group.tensor_to_key  # what came later is not in the file


class Places:
    """The place of each of a model's parameters, by the name that the model gives it."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._groups = _groups(model)
        self._maps: dict[str, Mapping[str, torch.Tensor]] = {}
        for path, module in self._modules.items():
            for hook in _accelerate_hooks(module):
                if getattr(hook, "offload", False) and hook.weights_map is not None:
                    self._maps[path] = hook.weights_map

    def __getitem__(self, name: str) -> Place:
        path, _, leaf = name.rpartition(".")
        owner = self._modules[path]
        near = next((parent for parent in parents(name) if parent in self._maps), None)
        offloaded = None if near is None else (self._maps[near], name.removeprefix(f"{near}." if near else ""))
        return Place(owner, leaf, offloaded, self._groups.get(id(owner._parameters[leaf])))


def parents(name: str) -> Iterator[str]:
    """Paths of the modules around a parameter, the nearest first; "" is the model."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def execution_device(model: nn.Module, module: nn.Module) -> torch.device | None:
    """Where an offloaded module runs, if what is put beside its weights does not get there by itself; else None."""
    for hook in _accelerate_hooks(module):
        if getattr(hook, "offload", False) and hook.execution_device is not None:
            return torch.device(hook.execution_device)
    groups = _groups(model)
    for parameter in module.parameters():
        group = groups.get(id(parameter))
        if group is not None and (group.offload_to_disk_path or module in group.modules):
            return torch.device(group.onload_device)
    return None


def join_offloading(model: nn.Module, module: nn.Module) -> Callable[[], None]:
    """Let a module that came later move with the diffusers group around it. Returns the undo.

    With streams a group has a list of its parameters, and fails at one that is not in it.
    """
    joined: list[tuple[dict[torch.Tensor, torch.Tensor], torch.Tensor]] = []
    for group in {id(group): group for group in _groups(model).values() if group.stream is not None}.values():
        if group.offload_to_disk_path is None and any(module in one.modules() for one in group.modules):
            for parameter in module.parameters():
                if parameter not in group.cpu_param_dict:
                    copy = parameter.data.cpu()
                    group.cpu_param_dict[parameter] = copy if group.low_cpu_mem_usage else copy.pin_memory()
                    joined.append((group.cpu_param_dict, parameter))

    def undo() -> None:
        for copies, parameter in joined:
            copies.pop(parameter, None)

    return undo


def _groups(model: nn.Module) -> dict[int, Any]:
    """diffusers' offloading groups, by the id of each parameter in them."""
    found: dict[int, Any] = {}
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook("group_offloading")
        if hook is not None:
            inside = chain.from_iterable(one.parameters() for one in hook.group.modules)
            found.update({id(parameter): hook.group for parameter in chain(inside, hook.group.parameters)})
    return found


def _accelerate_hooks(module: nn.Module) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def _store(values: Mapping[str, torch.Tensor], key: str) -> tuple[Any, str]:
    """The mapping under the views that accelerate's hooks have of it, and the key there."""
    while hasattr(values, "dataset"):
        values, key = values.dataset, f"{values.prefix}{key}"  # type: ignore[attr-defined]
    # Beside weights on disk there is a part in memory, which goes first.
    return getattr(values, "state_dict", values), key


def _write_offloaded(values: Mapping[str, torch.Tensor], key: str, value: torch.Tensor) -> None:
    before = values[key]
    store, full_key = _store(values, key)
    value = value.to(before.device, before.dtype)
    for name in [name for name, tensor in store.items() if tensor is before]:
        store[name] = value  # tied weights
    store[full_key] = value
