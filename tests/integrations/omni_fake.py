"""A stand-in of what vllm-omni gives a diffusion attention backend: the names, arguments and fields that it has."""

from __future__ import annotations

import importlib
import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any


@dataclass(frozen=True)
class Span:
    start: int
    latent_grid: tuple[int, int, int]
    role: str


@dataclass(frozen=True)
class Video:
    prefix_len: int | None = None
    latent_grid: tuple[int, int, int] | None = None
    used_len: int | None = None
    video_spans: tuple[Span, ...] = ()


@dataclass
class Metadata:
    attn_mask: Any = None
    video_layout: Video | None = None


class Backend(ABC):
    @staticmethod
    @abstractmethod
    def get_name() -> str: ...

    @staticmethod
    @abstractmethod
    def get_impl_cls() -> Any: ...

    @staticmethod
    @abstractmethod
    def get_metadata_cls() -> Any: ...

    @staticmethod
    @abstractmethod
    def get_builder_cls() -> Any: ...

    @staticmethod
    @abstractmethod
    def get_supported_head_sizes() -> list[int]: ...


class Impl(ABC):
    @abstractmethod
    def __init__(self, num_heads: int, head_size: int, softmax_scale: float, **more: Any) -> None: ...


class Names(Enum):
    TORCH_SDPA = "own.sdpa"
    SAGE_ATTN = "own.sage"


class Registry:
    """Which class stands for a name."""

    def __init__(self) -> None:
        self.paths: dict[Names, str] = {}

    def register(self, member: Names, path: str) -> None:
        self.paths[member] = path

    def class_of(self, member: Names) -> Any:
        module, _, name = self.paths[member].rpartition(".")
        return getattr(importlib.import_module(module), name)


@contextmanager
def installed() -> Iterator[Registry]:
    """vllm-omni can be imported while the context is open."""
    ours = "dit_accel.vllm_omni.backend"
    path = "vllm_omni.diffusion.attention.backends"
    registry = Registry()
    names = [".".join(path.split(".")[:depth]) for depth in range(1, 5)] + [f"{path}.abstract", f"{path}.registry"]
    modules = {name: types.ModuleType(name) for name in names}
    for name in names[1:]:
        above, _, last = name.rpartition(".")
        setattr(modules[above], last, modules[name])
    vars(modules[f"{path}.abstract"]).update(AttentionBackend=Backend, AttentionImpl=Impl, AttentionMetadata=Metadata)
    vars(modules[f"{path}.registry"]).update(
        DiffusionAttentionBackendEnum=Names, register_diffusion_backend=registry.register
    )
    before = {name: sys.modules.get(name) for name in (*names, ours)}
    sys.modules.update(modules)
    sys.modules.pop(ours, None)
    try:
        yield registry
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
