"""Which parameters are trained, their values before, and how all comes back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..patches.handle import PatchHandle
from ..patches.learned import is_learned
from .adapter import LORA_NAME, add_lora
from .config import FinetuneConfig

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
    """

    def __init__(
        self, model: Any, handle: PatchHandle, attentions: Mapping[str, nn.Module], config: FinetuneConfig
    ) -> None:
        self.model = model
        self.handle = handle
        self.lora = config.lora_rank > 0
        self._flags = {id(p): p.requires_grad for p in model.parameters()}
        if self.lora:
            layers = [
                f"{path}.{name}"
                for path, module in attentions.items()
                for name, child in module.named_modules()
                if isinstance(child, nn.Linear) and name.split(".")[0] in PROJECTIONS
            ]
            handle.record(add_lora(model, layers, config.lora_rank, config.lora_rank))
        self.backbone: list[str] = []
        for name, parameter in model.named_parameters():
            train = is_learned(name) or (f".{LORA_NAME}." in name and ".lora_" in name)
            if not train and not self.lora and self._is_trained(name, attentions, config.train):
                train = parameter.is_floating_point()
                if train:
                    self.backbone.append(name)
            parameter.requires_grad_(train)
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                f"train = {config.train!r} leaves nothing to train: the recipe has no parameters of its own."
            )
        own = dict(model.named_parameters())
        self.base = {name: own[name].detach().clone() for name in self.backbone}
        self._dtypes = {name: own[name].dtype for name in self.named()}
        for parameter in self.named().values():
            # Adam's steps are far below the resolution of half precision.
            parameter.data = parameter.data.float()

    @staticmethod
    def _is_trained(name: str, attentions: Mapping[str, nn.Module], train: str) -> bool:
        if train == "all":
            return True
        path = next((path for path in attentions if name.startswith(f"{path}.")), None)
        inner = "" if path is None else name.removeprefix(f"{path}.").split(".")[0]
        return train == "attention" and inner in PROJECTIONS

    def named(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @contextmanager
    def dense_teacher(self, frozen: bool) -> Iterator[None]:
        """The dense model while the context is open: the patch is off; ``frozen`` also takes the training
        back for as long."""
        with self.handle.disabled(), self._untrained() if frozen else _nothing():
            yield

    @contextmanager
    def _untrained(self) -> Iterator[None]:
        if self.lora:
            self.model.disable_adapters()
            try:
                yield
            finally:
                self.model.enable_adapters()
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
        """Dtypes and flags as they were; the training's result stays."""
        for name, parameter in self.named().items():
            parameter.data = parameter.data.to(self._dtypes[name])
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
