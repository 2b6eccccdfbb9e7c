"""Where pixels are compared: on a GPU where there is one, which takes a hundredth of a CPU's time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

ResultT = TypeVar("ResultT")
CPU = torch.device("cpu")


def on_the_fastest(compute: Callable[[torch.device], ResultT]) -> ResultT:
    """What a function computes on the current GPU, or on the CPU where there is none or its memory is full.

    Convolutions are in full float32, as on a CPU.
    """
    if not torch.cuda.is_available():
        return compute(CPU)
    cudnn = torch.backends.cudnn
    try:
        with cudnn.flags(enabled=cudnn.enabled, allow_tf32=False):
            return compute(torch.device("cuda", torch.cuda.current_device()))
    except torch.OutOfMemoryError:
        return compute(CPU)
