"""Native torch hooks that publish layer and latents. They leave no trace in state dicts and survive
offloading, LoRA and fused projections, where attention processors are swapped and diffusers' own hooks lose
their order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from .ambient import EAGER, TRACED
from .learned import CHILD

if TYPE_CHECKING:
    from .handle import PatchHandle
    from .session import Session


def inert(*args: Any, **kwargs: Any) -> None:
    """What a hook becomes in a deep copy of a patched model: the copy is not patched."""


@cache
def patched_class(original: type[nn.Module]) -> type[nn.Module]:
    """The class of a patched attention module: the same in all but identity.

    torch.compile reuses code between modules of one class and does not look at their hooks. Without a class
    of its own a patched module would silently run code compiled for an unpatched one, or the other way round.
    """

    def reduce_to_original(self: nn.Module, protocol: Any) -> Any:
        make, arguments, *state = cast(tuple[Any, ...], original.__reduce_ex__(self, protocol))
        return make, tuple(original if a is patched else a for a in arguments), *state

    names = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    # A copy or a pickle is of the original class.
    patched = type(original.__name__, (original,), {**names, "__reduce_ex__": reduce_to_original})
    return patched


class PublishLayer:
    """Forward pre-hook of a self-attention module."""

    def __init__(self, session_id: int, layer: int) -> None:
        # A tensor, because torch.compile would specialise a graph for each value of an int.
        self.layer = torch.tensor([session_id, layer])

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            TRACED.layer = self.layer
            # Inputs of the graph, so that they get their gradients; eager calls find them by layer.
            learned = module._modules.get(CHILD)
            TRACED.learned = () if learned is None else tuple(learned.parameters())
        else:
            EAGER.layer = self.layer

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return inert


class ClearLayer:
    """Forward hook of a self-attention module."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling():
            TRACED.layer = None
            TRACED.learned = ()
        else:
            EAGER.layer = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return inert


class PublishLatents:
    """Forward pre-hook of a transformer."""

    def __init__(self, session: Session, handle: PatchHandle, argument_names: tuple[str, ...]) -> None:
        self.session = session
        self.handle = handle
        self.argument_names = argument_names

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        arguments = dict(zip(self.argument_names, args, strict=False))
        arguments.update(kwargs)
        latents = self.session.family.read(self.session.patch_size, arguments)
        if torch.compiler.is_compiling():
            TRACED.latents = latents
        else:
            EAGER.latents = latents
            self.session.begin_forward()

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return inert


class ClearAll:
    """Forward hook of a transformer, called also after an exception: nothing published outlives a forward."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling():
            TRACED.layer = TRACED.latents = None
            TRACED.learned = ()
        else:
            EAGER.layer = EAGER.latents = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return inert


class BranchContext:
    """Stands in for a transformer's ``cache_context`` to learn which guidance branch is running."""

    def __init__(self, original: Callable[..., AbstractContextManager[None]]) -> None:
        self.original = original

    @contextmanager
    def __call__(self, name: str, **kwargs: Any) -> Any:
        outer = EAGER.branch
        EAGER.branch = name
        try:
            with self.original(name, **kwargs):
                yield
        finally:
            EAGER.branch = outer

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        owner = getattr(self.original, "__self__", None)
        copy = memo.get(id(owner))
        # The copy's own method, as if never replaced.
        return self.original if copy is None else MethodType(type(copy).cache_context, copy)
