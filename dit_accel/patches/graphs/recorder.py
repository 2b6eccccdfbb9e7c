"""Captures launches as a CUDA graph."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, cast

import torch


class Graph(Protocol):
    """Launches that can be repeated."""

    def replay(self) -> None: ...


class Recorder(Protocol):
    """Captures what a function launches; nothing is computed before the first replay."""

    def capture(self, launch: Callable[[], None]) -> Graph: ...


class _Streams(threading.local):
    """A stream of its own for each device, since cuBLAS keeps memory for every stream that it has seen."""

    def __init__(self) -> None:
        self.of_device: dict[torch.device, torch.cuda.Stream] = {}


_streams = _Streams()


class CudaRecorder:
    """Graphs of one run share memory for what they compute on the way: one stream replays them one after the other, and
    none reads what another left there.

    ``torch.cuda.graph`` collects garbage and empties the allocator's cache for each graph, which takes longer than a
    step of a small model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.MemPool()
            found = _streams.of_device.get(device)
            self._stream = torch.cuda.Stream() if found is None else found
            if found is None:
                _streams.of_device[device] = self._stream
                with torch.cuda.stream(self._stream):
                    # What cuBLAS takes for the stream must not be of a graph.
                    small = torch.ones(16, 16, device=device)
                    for dtype in (torch.float32, torch.float16, torch.bfloat16):
                        torch.nn.functional.linear(small.to(dtype), small.to(dtype), small[0].to(dtype))

    def capture(self, launch: Callable[[], None]) -> Graph:
        """A graph of what a function launches on the current stream.

        Raises:
            Exception: what the function raises; RuntimeError where it waits for the device.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            collects = gc.isenabled()
            gc.disable()  # a collection may free memory of the device, which a capture forbids
            try:
                with torch.cuda.stream(self._stream):
                    graph.capture_begin(pool=cast("Any", self._pool.id), capture_error_mode="thread_local")
                    try:
                        launch()
                    except BaseException:
                        _end_failed(graph)
                        raise
                    graph.capture_end()
            finally:
                if collects:
                    gc.enable()
            current.wait_stream(self._stream)
        return graph


def _end_failed(graph: torch.cuda.CUDAGraph) -> None:
    with suppress(RuntimeError):  # it says once more that the capture failed
        graph.capture_end()
