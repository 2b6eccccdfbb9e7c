"""Time spent on a device without waiting for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from .kernels.common.launch import is_captured

# A training makes millions of events; those that are long past are summed up before there are more than so many.
KEPT_EVENTS = 2048

# Where a region begins or ends; None while a CUDA graph is captured.
Moment = float | torch.cuda.Event | None


class Stopwatch:
    """Adds up the time of code regions: wall-clock on the CPU, events on a GPU. A CUDA graph that is captured has no
    time; its replays are not seen."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self, device: torch.device) -> Moment:
        """Begin a region; give the result to :meth:`stop`. A region that raises is simply never stopped."""
        if device.type != "cuda":
            return time.perf_counter()
        return None if is_captured(device) else _event(device)

    def stop(self, begin: Moment, device: torch.device) -> Moment:
        """End a region; the result may begin the next one."""
        if begin is None:
            return None
        if isinstance(begin, float):
            now = time.perf_counter()
            self._seconds += now - begin
            return now
        end = _event(device)
        self._events.append((begin, end))
        if len(self._events) > KEPT_EVENTS:
            self._add_up(KEPT_EVENTS // 2)
        return end

    @contextmanager
    def timing(self, device: torch.device) -> Iterator[None]:
        """Around a region."""
        begin = self.start(device)
        yield
        self.stop(begin, device)

    def seconds(self) -> float:
        """Total so far; waits for the device."""
        self._add_up(len(self._events))
        return self._seconds

    def reset(self) -> None:
        """Begin at nothing. A region that is under way counts when it ends."""
        self._seconds = 0.0
        self._events.clear()

    def _add_up(self, count: int) -> None:
        for begin, end in self._events[:count]:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        del self._events[:count]


def _event(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    index = torch.cuda.current_device() if device.index is None else device.index
    event.record(_stream(index, torch._C._cuda_getCurrentRawStream(index)))
    return event


@cache
def _stream(index: int, _handle: int) -> torch.cuda.Stream:
    """The current stream of a GPU, by its handle: torch makes a new object each time, 10 us of the host."""
    return torch.cuda.current_stream(index)
