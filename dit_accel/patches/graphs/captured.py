"""A block's launches, captured under plans that stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...call import AttentionCall
from ...engine import Engine
from ...graph_hold import Held
from ...records import BackendsUsed, Shares
from ..forwards import Forward
from .arguments import CannotCapture, Form, put_together, taken_apart
from .likeness import Likeness
from .recorder import Graph, Recorder
from .served import Served
from .static import Slot, Slots


@dataclass(eq=False)
class Ran:
    """The latest time that a block ran by itself in a branch.

    Attributes:
        served: how its layers were served, by layer.
        results, results_form: sizes of what it returned, and their form.
    """

    served: dict[int, Served]
    results: list[torch.Tensor]
    results_form: Form

    @classmethod
    def of(cls, served: dict[int, Served], out: object) -> Ran:
        """Of what a block returned.

        Raises:
            CannotCapture: something else than tensors and plain values is in it.
        """
        results, form = taken_apart(out)
        sizes = [torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="meta") for one in results]
        return cls(served, sizes, form)


@dataclass(eq=False)
class Captured:
    """A block's launches under plans that stay.

    Attributes:
        served: how its layers are served, by layer.
        given, given_form: where it reads what it is given, and the form of that.
        results, results_form: where it leaves what it returns.
        held: what the graph reads and nothing else may keep.
        shares: of the layers whose plans it makes, by layer: what it writes there in a replay.
        counted: where the backends stand that a call of it has used; another one after a reset.
    """

    graph: Graph
    likeness: Likeness
    served: dict[int, Served]
    given: list[Slot]
    given_form: Form
    results: list[Slot]
    results_form: Form
    held: Held
    counted: BackendsUsed
    shares: dict[int, Shares]

    def shares_of(self, layer: int) -> Shares | None:
        """What the layer computed in the latest replay; None where it is always dense."""
        written = self.shares.get(layer)
        if written is None:
            return self.served[layer].shares
        # The next replay writes other numbers there.
        return Shares(written.density.clone(), None if written.seen is None else written.seen.clone())

    def takes(self, slots: Slots, tensors: list[torch.Tensor]) -> bool:
        """Put what the block is given where the graph reads it; False where something else that is needed lies there,
        or where the graph would write."""
        moved = [(slot, tensor) for slot, tensor in zip(self.given, tensors, strict=True) if not slot.holds(tensor)]
        if any(slots.is_result(slot) and not slot.is_free for slot, _ in moved):
            return False
        if not all(slot.is_free for slot in self.results):
            return False
        for slot, tensor in moved:
            slot.fill(tensor)
        return True

    def replay(self) -> Any:
        """What the block returns."""
        self.graph.replay()
        return put_together(self.results_form, [slot.shown() for slot in self.results])


def capture(
    block: nn.Module,
    run: Callable[..., Any],
    ran: Ran,
    tensors: list[torch.Tensor],
    form: Form,
    slots: Slots,
    recorder: Recorder,
    engine: Engine,
    forward: Forward,
) -> Captured:
    """Capture a block; nothing has run then.

    Args:
        block: whose launches they are.
        run: launches them.
        ran: when it last ran by itself, under the same plans.
        tensors, form: what it is given.
        slots: where graphs of this run read and write.
        engine, forward: of the transformer, and under way.

    Raises:
        Exception: what the block raises, where it waits for the device; CannotCapture where a replay would do
            something else.
    """
    likeness, device = Likeness(block), tensors[0].device
    given: list[Slot] = []
    for tensor in tensors:
        given.append(slots.of_given(tensor, given))
    results: list[Slot] = []
    for like in ran.results:
        results.append(slots.for_result(like, device, [*given, *results]))
    for layer in ran.served:
        nans = engine.records[layer].replayed_nans
        if device not in nans:  # another thread may be faster
            nans.setdefault(device, torch.zeros((), dtype=torch.int64, device=device))
    for slot, tensor in zip(given, tensors, strict=True):
        if not slot.holds(tensor):
            slot.fill(tensor)
    versions = [slot.tensor._version for slot in given]
    args, kwargs = put_together(form, [slot.tensor for slot in given])

    def launch() -> None:
        out, out_form = taken_apart(run(*args, **kwargs))
        if out_form != ran.results_form:
            raise CannotCapture("a block returned something of another form than before")
        for tensor, slot in zip(out, results, strict=True):
            slot.write(tensor)

    shares: dict[int, Shares] = {}

    def watch(call: AttentionCall) -> None:
        served = ran.served[call.layer]
        if call.used.get(call.layer) is not served.kept:
            raise CannotCapture("a layer's plan changed while it was captured")
        if served.makes_plan:
            assert call.plan is not None
            shares[call.layer] = engine.shares_of(call, call.plan)  # as a part of the graph

    held: Held = {}
    calls, forward.watch = dict(forward.calls), watch
    try:
        with engine.planner.of_graphs.instead(held):
            graph = recorder.capture(launch)
    finally:
        forward.calls, forward.watch = calls, None
    if versions != [slot.tensor._version for slot in given]:
        raise CannotCapture("a block changes what it is given")
    return Captured(
        graph, likeness, ran.served, given, form, results, ran.results_form, held, engine.backends_used, shares
    )
