"""Which parameters are trained, their values before, and how all comes back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..patches.handle import PatchHandle
from ..patches.learned import is_learned
from .config import FinetuneConfig
from .lora import LORA_NAME, add_lora, lora_parameters, without_lora

# Linear layers of diffusers' attention modules: image and text streams, in and out.
PROJECTIONS = (
    "to_q",
    "to_k",
    "to_v",
    "to_qkv",
    "to_out",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
)
NOTHING_TO_TRAIN = "train = {train!r} leaves nothing to train: the recipe has no parameters of its own."


class Trainables:
    """The trained parameters of a patched transformer.

    Args:
        model: the transformer; its flags and dtypes are changed until :meth:`release`.
        handle: of its patch.
        attentions: its patched attention modules by path.
        config: what to train.

    Attributes:
        lora: whether LoRA layers are trained in place of weights.
        backbone: names of the model's own trained parameters.
        base: their values before the training; LoRA needs none.
        dtype: of the model before the training.
    """

    def __init__(
        self, model: Any, handle: PatchHandle, attentions: Mapping[str, nn.Module], config: FinetuneConfig
    ) -> None:
        self.model = model
        self.handle = handle
        self.lora = config.lora_rank > 0
        self.dtype: torch.dtype = model.dtype
        self._flags = {id(p): p.requires_grad for p in model.parameters()}
        self._first: dict[str, torch.Tensor] = {}
        # Fixed: others switch what requires gradients too, as peft does for each adapter that it activates.
        self._names: tuple[str, ...] = ()
        self._remove_lora: Callable[[], None] | None = None
        own = dict(model.named_parameters())
        users_lora = lora_parameters(model)
        self.backbone = [
            name
            for name, parameter in own.items()
            if not self.lora
            and not is_learned(name)
            and name not in users_lora
            and parameter.is_floating_point()
            and self._is_trained(name, attentions, config.train)
        ]
        layers = self._lora_layers(attentions) if self.lora else []
        if not self.backbone and not layers and not any(map(is_learned, own)):
            raise ValueError(NOTHING_TO_TRAIN.format(train=config.train))
        try:
            self._begin(layers, config.lora_rank)
        except BaseException:
            self.take_back()
            raise

    def _begin(self, layers: Collection[str], rank: int) -> None:
        if layers:
            self._remove_lora = add_lora(self.model, layers, rank, rank)
        own = dict(self.model.named_parameters())
        trained = {name for name in own if is_learned(name)} | lora_parameters(self.model, LORA_NAME)
        self._names = tuple(name for name in own if name in trained or name in self.backbone)
        for name, parameter in own.items():
            parameter.requires_grad_(name in self._names)
        named = self.named()
        self._first = {name: parameter.detach().clone() for name, parameter in named.items()}
        self.base = {name: self._first[name] for name in self.backbone}
        self._dtypes = {name: parameter.dtype for name, parameter in named.items()}
        for parameter in named.values():
            # Adam's steps are far below the resolution of half precision.
            parameter.data = parameter.data.float()

    @staticmethod
    def _lora_layers(attentions: Mapping[str, nn.Module]) -> list[str]:
        return [
            f"{path}.{name}"
            for path, module in attentions.items()
            for name, child in module.named_modules()
            if isinstance(child, nn.Linear) and name.split(".")[0] in PROJECTIONS
        ]

    @staticmethod
    def _is_trained(name: str, attentions: Mapping[str, nn.Module], train: str) -> bool:
        if train == "all":
            return True
        path = next((path for path in attentions if name.startswith(f"{path}.")), None)
        inner = "" if path is None else name.removeprefix(f"{path}.").split(".")[0]
        return train == "attention" and inner in PROJECTIONS

    def named(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name."""
        own = dict(self.model.named_parameters())
        return {name: own[name] for name in self._names}

    @contextmanager
    def dense_teacher(self, frozen: bool) -> Iterator[None]:
        """The dense model while the context is open: the patch is off; ``frozen`` also takes the training
        back for as long."""
        with self.handle.disabled(), self._untrained() if frozen else _nothing():
            yield

    @contextmanager
    def _untrained(self) -> Iterator[None]:
        if self.lora:
            with without_lora(self.model, LORA_NAME):
                yield
            return
        own = dict(self.model.named_parameters())
        trained = {name: own[name].data for name in self.backbone}
        for name, value in self.base.items():
            own[name].data = value.to(own[name].device, own[name].dtype)
        try:
            yield
        finally:
            for name, data in trained.items():
                own[name].data = data

    def release(self) -> None:
        """Dtypes and flags as they were; the training's result stays, and LoRA layers until the patch is removed."""
        for name, parameter in self.named().items():
            parameter.data = parameter.data.to(self._dtypes[name])
        if self._remove_lora is not None:
            self.handle.record(self._remove_lora)
            self._remove_lora = None
        self._restore_flags()

    def take_back(self) -> None:
        """Everything as before the training, also the values; only shards keep what they learned."""
        own = dict(self.model.named_parameters())
        for name, value in self._first.items():
            data = own[name].data
            if hasattr(data, "full_tensor"):
                continue
            if data.dtype == value.dtype:
                data.copy_(value)  # into the memory that the model had
            else:
                own[name].data = value
        if self._remove_lora is not None:
            self._remove_lora()
            self._remove_lora = None
        self._restore_flags()

    def _restore_flags(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None
            parameter.requires_grad_(self._flags.get(id(parameter), True))


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def copy_values(target: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    """Copy values into parameters of the same names.

    Raises:
        ValueError: names differ.
    """
    if target.keys() != values.keys():
        odd = sorted(target.keys() ^ values.keys())[0]
        raise ValueError(f"The checkpoint trains other parameters: {odd} is only in one of the two.")
    with torch.no_grad():
        for name, value in values.items():
            target[name].copy_(value)
