"""A block whose calls a hook of a cache may answer, outside of what torch.compile makes of the block."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from ..hook import Hook
from ..hooks import patched_class
from .tracker import ReuseTracker

_SLOT = "_dit_accel_reuse"


class HostedHook(Hook):
    """A hook of diffusers around one block.

    diffusers replaces ``forward``, which torch.compile traces, and whose decisions break its graphs. This stands in
    the block's ``__call__``, before compiled code is entered: a block that is compiled runs as it would alone, and
    one that is offloaded is not even brought in where it is skipped.
    """

    def __init__(self, tracker: ReuseTracker, block: nn.Module, hook: Any) -> None:
        self.tracker = tracker
        self.hook = hook
        self.original = type(block)
        of_block, original = weakref.ref(block), type(block)

        def compute(*args: Any, **kwargs: Any) -> Any:
            now, alive = tracker.current, of_block()
            assert now is not None
            assert alive is not None
            now.calls += 1
            return original.__call__(alive, *args, **kwargs)

        hook.fn_ref.original_forward = compute

    def call(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now = self.tracker.current
        if now is None:
            return self.original.__call__(block, *args, **kwargs)
        before = now.calls
        # A cache compares what goes in with what comes out, which is of this process' tokens alone.
        splits = _splits_of(block)
        for split in splits:
            args, kwargs = split.pre_forward(block, *args, **kwargs)
        with _done(splits) if splits else _NOT_SPLIT:
            output = self.hook.new_forward(block, *args, **kwargs)
        now.skipped |= now.calls == before
        return output


_NOT_SPLIT = nullcontext()


def _splits_of(block: nn.Module) -> list[Any]:
    """diffusers' hooks of context parallelism that split what a block is given: in some models the first does so."""
    registry: Any = getattr(block, "_diffusers_hook", None)
    if registry is None:
        return []
    hooks = registry.hooks
    return [hook for name, hook in hooks.items() if name.startswith("cp_input---")]


@contextmanager
def _done(splits: list[Any]) -> Iterator[None]:
    """While open, hooks that have split do not split again."""
    for split in splits:
        split.fn_ref.pre_forward = _as_given
    try:
        yield
    finally:
        for split in splits:
            split.fn_ref.pre_forward = split.pre_forward


def _as_given(_block: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


def _call_of(original: type[nn.Module]) -> Callable[..., Any]:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hosted = self.__dict__.get(_SLOT)
        if isinstance(hosted, HostedHook):
            return hosted.call(self, args, kwargs)
        return original.__call__(self, *args, **kwargs)

    return __call__


def host(block: nn.Module, hosted: HostedHook) -> Any:
    """Put a hook around a block. Returns the undo."""
    original = type(block)
    mine = patched_class(original, _call_of)  # type: ignore[arg-type]
    block.__dict__[_SLOT] = hosted
    block.__class__ = mine

    def undo() -> None:
        block.__dict__.pop(_SLOT, None)
        # Sharding has put a class of its own on top, which then finds no hook.
        if type(block) is mine:
            block.__class__ = original

    return undo
