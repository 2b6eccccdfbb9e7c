"""The time that a transformer spends in its blocks, compiled or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..patches.targets import attending_blocks
from ..timing import Stopwatch


@contextmanager
def timed_blocks(model: nn.Module) -> Iterator[Stopwatch]:
    """A watch that runs from the first block's start to the last block's end, in every forward.

    Hooks would be compiled with their block; what a compiled block is called by is not.
    """
    blocks, watch = attending_blocks(model), Stopwatch()
    first, last = blocks[0], blocks[-1]
    device = next(model.parameters()).device
    begun: list[Any] = []

    def started(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            begun.append(watch.start(device))
            return call(*args, **kwargs)

        return run

    def stopped(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            watch.stop(begun.pop(), device)
            return result

        return run

    before = [(block, block._compiled_call_impl) for block in (first, last)]
    for block, wrap in ((first, started), (last, stopped)):
        block._compiled_call_impl = torch._dynamo.disable(wrap(block._compiled_call_impl or block._call_impl))
    try:
        yield watch
    finally:
        for block, implementation in before:
            block._compiled_call_impl = implementation
