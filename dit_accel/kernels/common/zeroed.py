"""Zeros for kernels that count in them: made for many launches at once, since each that is made is a launch too."""

from __future__ import annotations

import torch

from .launch import is_captured

PIECES = 64
"""Launches that one allocation serves."""
MOST_KINDS = 64
"""Streams and lengths for which pieces are kept; where there are more, all begin anew."""


class ZeroedPieces:
    """int32 zeros ``[length]`` that nobody has written to. Each piece is of the stream that runs when it is taken, and
    is taken once. Threads may share it."""

    def __init__(self) -> None:
        self._left: dict[tuple[torch.device, int, int], list[torch.Tensor]] = {}

    def take(self, length: int, device: torch.device) -> torch.Tensor:
        """A piece on the current stream of a device, which is the current one. A CUDA graph that is captured gets zeros
        of its own, which each replay makes again."""
        if is_captured(device):
            return torch.zeros(length, dtype=torch.int32, device=device)
        stream = _stream(device)
        left = self._left.get((device, stream, length))
        try:
            return left.pop() if left else self._more(length, device, stream)
        except IndexError:  # another thread took the last one
            return self._more(length, device, stream)

    def _more(self, length: int, device: torch.device, stream: int) -> torch.Tensor:
        if len(self._left) >= MOST_KINDS:
            self._left.clear()
        made = list(torch.zeros((PIECES, length), dtype=torch.int32, device=device).unbind())
        piece = made.pop()
        self._left[device, stream, length] = made
        return piece


def _stream(device: torch.device) -> int:
    """Handle of a device's current stream; torch makes a new object for a stream each time, 10 us of the host."""
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    handle: int = torch._C._cuda_getCurrentRawStream(index)
    return handle
