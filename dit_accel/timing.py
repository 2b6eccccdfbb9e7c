"""Time spent on a device without waiting for it."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Adds up the time of code regions: wall-clock on the CPU, events on a GPU."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self, device: torch.device) -> float | torch.cuda.Event:
        """Begin a region; give the result to :meth:`stop`. A region that raises is simply never stopped."""
        if device.type != "cuda":
            return time.perf_counter()
        return _event(device)

    def stop(self, begin: float | torch.cuda.Event, device: torch.device) -> None:
        """End a region."""
        if isinstance(begin, float):
            self._seconds += time.perf_counter() - begin
        else:
            self._events.append((begin, _event(device)))

    def seconds(self) -> float:
        """Total so far; waits for the device."""
        for begin, end in self._events:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        self._events.clear()
        return self._seconds


def _event(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
