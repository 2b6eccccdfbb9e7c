"""Calls captured in CUDA graphs: replays are timed by benchmarks, and compared with the calls by tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

OutputT = TypeVar("OutputT")


@dataclass(frozen=True, eq=False)
class Captured(Generic[OutputT]):
    """A call's graph, and the output that each replay writes."""

    graph: torch.cuda.CUDAGraph
    output: OutputT

    def replay(self) -> None:
        """Enqueue the launches of the call."""
        self.graph.replay()


def captured(call: Callable[[], OutputT], warm_ups: int = 1) -> Captured[OutputT]:
    """The launches of a call without gradients, which has run ``warm_ups`` times before: what it compiles, plans and
    keeps is there when the capture begins."""
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warm_ups):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = call()
    return Captured(graph, output)
