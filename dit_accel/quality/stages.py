"""Where the time of a pipeline's call goes: text, denoising steps, decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..patches.targets import transformers_of
from ..timing import Stopwatch


@dataclass(frozen=True)
class Stages:
    """Seconds of one call.

    Attributes:
        text: until the first forward of a transformer: text encoders, and what else comes before.
        steps: all denoising steps.
        decode: from the last step to the frames on the host.
        count: of the denoising steps.
    """

    text: float
    steps: float
    decode: float
    count: int


class StageClock:
    """Takes the stages of one call, without waiting for the device in between."""

    def __init__(self, pipe: Any) -> None:
        self._device = device_of(pipe)
        self._text, self._decode = Stopwatch(), Stopwatch()
        self._begin = self._text.start(self._device)
        self._first = False
        self._count = 0

    def forward(self) -> None:
        """Before the first forward of a transformer."""
        self._text.stop(self._begin, self._device)
        self._first = True

    def step(self) -> None:
        """After a denoising step."""
        self._step = self._decode.start(self._device)
        self._count += 1

    def stages(self, total: float) -> Stages | None:
        """Right at the end of the call, which took ``total`` seconds; None where it did not show its stages."""
        if not self._first or not self._count:
            return None
        self._decode.stop(self._step, self._device)
        text, decode = self._text.seconds(), self._decode.seconds()
        return Stages(text, max(total - text - decode, 0.0), decode, self._count)


def device_of(pipe: Any) -> torch.device:
    """Where a pipeline runs, which under offloading is not where its weights are."""
    return torch.device(getattr(pipe, "_execution_device", getattr(pipe, "device", "cpu")))


@contextmanager
def at_first_forward(pipe: Any, note: Callable[[], None]) -> Iterator[None]:
    """Call ``note`` before the first forward of any transformer of a pipeline, while the context is open.

    A pipeline without a transformer that can be patched is left alone.
    """
    begun = False

    def look(*_: Any) -> None:
        nonlocal begun
        if not begun:
            begun = True
            note()

    try:
        names = [name for name, _, _ in transformers_of(pipe)]
    except ValueError:
        names = []
    # The component itself: a hook within a compiled whole would be traced.
    hooks = [pipe.components[name].register_forward_pre_hook(look) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
