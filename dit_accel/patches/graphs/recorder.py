"""Captures launches as a CUDA graph."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch

# Share of a device's memory below which what graphs have used goes back between two runs, for the decoder.
SCARCE = 0.25


class Graph(Protocol):
    """Launches that can be repeated."""

    def replay(self) -> None: ...


class Recorder(Protocol):
    """Captures what a function launches; nothing is computed before the first replay."""

    def capture(self, launch: Callable[[], None]) -> Graph: ...

    def release(self) -> None:
        """All graphs are gone."""


class _Streams(threading.local):
    """A stream beside each that runs are on, since cuBLAS keeps memory for every stream that it has seen."""

    def __init__(self) -> None:
        self.beside: dict[tuple[torch.device, int], torch.cuda.Stream] = {}


_streams = _Streams()
# The collector of garbage is of the process: another thread must not turn it on again within a capture.
_one_at_a_time = threading.Lock()


class CudaRecorder:
    """Graphs of one thread and stream share memory for what they compute on the way: the stream replays them one after
    the other, and none reads what another left there.

    ``torch.cuda.graph`` collects garbage and empties the allocator's cache for each graph, which takes longer than a
    step of a small model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        # A graph that is never replayed: memory of a pool without one would not be found again.
        self._keeper: torch.cuda.CUDAGraph | None = None
        with torch.cuda.device(device):
            self._stream = _stream(device)
            self._nothing = torch.zeros((), device=device)

    def capture(self, launch: Callable[[], None]) -> Graph:
        """A graph of what a function launches on the current stream.

        Raises:
            Exception: what the function raises; RuntimeError where it waits for the device.
        """
        if self._keeper is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._keeper = self._captured(self._nothing.zero_)
        return self._captured(launch)

    def release(self) -> None:
        """All graphs are gone. Their memory waits for the next ones, or goes back where little is free."""
        free, total = torch.cuda.mem_get_info(self._device)
        if free < SCARCE * total:
            self._keeper = None

    def _captured(self, launch: Callable[[], object]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), _one_at_a_time:
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            collects = gc.isenabled()
            gc.disable()  # a collection may free memory of the device, which a capture forbids
            try:
                with torch.cuda.stream(self._stream):
                    graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                    try:
                        launch()
                    except BaseException:
                        with suppress(RuntimeError):  # it says once more that the capture failed
                            self._end(graph)
                        raise
                    self._end(graph)
            finally:
                if collects:
                    gc.enable()
            current.wait_stream(self._stream)
        return graph

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        try:
            graph.capture_end()
        except RuntimeError:
            # torch leaves its allocator as if the capture went on: it would never again free what two streams used.
            index = torch.cuda.current_device()
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(index, self._pool)
            torch._C._cuda_releasePool(index, self._pool)
            raise


def _stream(device: torch.device) -> torch.cuda.Stream:
    place = device, torch.cuda.current_stream().cuda_stream
    found = _streams.beside.get(place)
    if found is None:
        found = _streams.beside[place] = torch.cuda.Stream()
        with torch.cuda.stream(found):
            # What cuBLAS takes for the stream must not be of a graph.
            small = torch.ones(16, 16, device=device)
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                torch.nn.functional.linear(small.to(dtype), small.to(dtype), small[0].to(dtype))
    return found
