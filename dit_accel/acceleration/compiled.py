"""torch.compile of the repeated blocks of transformers, which can be taken back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..patches.targets import repeated_blocks, transformers_of


def compile_blocks(pipe: Any, **options: Any) -> Callable[[], None]:
    """Compile the repeated blocks of every transformer: seconds, where a whole model takes minutes.

    Args:
        pipe: a pipeline, or one transformer.
        options: of ``torch.compile``.

    Returns:
        The undo. Blocks that were compiled before are then as they were.

    Raises:
        ValueError: it holds no transformer that could be patched.
    """
    blocks = [block for _, model, family in transformers_of(pipe) for block in repeated_blocks(model, family)]
    before = [block._compiled_call_impl for block in blocks]
    for block in blocks:
        block.compile(**options)

    def undo() -> None:
        for block, implementation in zip(blocks, before, strict=True):
            _compiled_as(block, implementation)

    return undo


def compile_module(module: nn.Module, **options: Any) -> Callable[[], None]:
    """Compile one module. Returns the undo."""
    before = module._compiled_call_impl
    module.compile(**options)
    return lambda: _compiled_as(module, before)


def _compiled_as(module: nn.Module, implementation: Any) -> None:
    module._compiled_call_impl = implementation
