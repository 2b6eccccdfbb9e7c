"""A transformer's blocks, which are captured when what they do stays the same from one step to the next.

A graph lives within a run: between runs weights, adapters and sizes may change, and to capture a block takes no longer
than to run it once.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...call import AttentionCall
from ...graph_hold import Held
from ...kernels.common.launch import is_captured
from ...records import BackendsUsed
from ...run import Run
from ...stages.schedule import DENSE_LAYER
from ..forwards import Forward
from ..session import Session
from .arguments import CannotCapture, Form, put_together, taken_apart
from .conditions import OF_INFERENCE, why_not_now
from .likeness import Likeness
from .recorder import CudaRecorder, Graph, Recorder
from .served import Served
from .static import Slot, Slots

RecorderOf = Callable[[torch.device], Recorder]


@dataclass(eq=False)
class Captured:
    """A block's launches under plans that stay.

    Attributes:
        served: how its layers are served, by layer.
        given, given_form: where it reads what it is given, and the form of that.
        results, results_form: where it leaves what it returns.
        held: what the graph reads and nothing else may keep.
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


@dataclass(eq=False)
class _Ran:
    """The latest time that a block ran by itself in a branch."""

    served: dict[int, Served]
    results: list[torch.Tensor]
    results_form: Form


@dataclass(eq=False)
class _OfBranch:
    """A guidance branch of a run, by block.

    Attributes:
        latest: the step in which it ran last.
    """

    latest: int
    captured: dict[int, Captured] = field(default_factory=dict)
    ran: dict[int, _Ran] = field(default_factory=dict)


@dataclass(eq=False)
class _OfRun:
    """A run on one stream of one device."""

    recorder: Recorder
    slots: Slots = field(default_factory=Slots)
    branches: dict[Any, _OfBranch] = field(default_factory=dict)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.runs: weakref.WeakKeyDictionary[Run, dict[Any, _OfRun]] = weakref.WeakKeyDictionary()
        self.recorders: dict[tuple[torch.device, int], Recorder] = {}


class BlockGraphs:
    """The graphs of one transformer's blocks, in all threads.

    Args:
        session: of the patched transformer.
        recorder_of: captures on a device, for its current stream.

    Attributes:
        together: those of all transformers of a pipeline, this one's too.
    """

    device_type = "cuda"

    def __init__(self, session: Session, recorder_of: RecorderOf = CudaRecorder) -> None:
        self.session = session
        self._recorder_of = recorder_of
        self._thread = _Thread()
        self._failed = False
        self.together = [self]

    def call(self, block: CapturedBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A block's call in eager code."""
        forward = self.session.forward
        if forward is None or self._failed:
            return block.inner(*args, **kwargs)
        why_not = why_not_now(self.session, forward, self.device_type)
        if why_not is not None:
            if why_not:
                self.session.engine.note(f"Blocks run without CUDA graphs: {why_not}.")
            return block.inner(*args, **kwargs)
        try:
            tensors, form = taken_apart((args, kwargs))
        except CannotCapture as why:
            return self._fail(block, args, kwargs, why)
        if any(layer in forward.calls for layer in block.layers):
            return self._fail(block, args, kwargs, CannotCapture("a block runs more than once in a forward"))
        for tensor in tensors:
            if tensor.device.type != self.device_type:
                return self._fail(block, args, kwargs, CannotCapture(f"a block is given a tensor on {tensor.device}"))
            if tensor.is_inference():  # and does not count its changes
                self.session.engine.note(f"Blocks run without CUDA graphs: {OF_INFERENCE}.")
                return block.inner(*args, **kwargs)
        if not tensors or is_captured(tensors[0].device):  # by somebody else
            return block.inner(*args, **kwargs)
        of_run = self._of_run(forward, tensors[0].device)
        assert forward.step.index is not None
        branch = of_run.branches.setdefault(forward.step.branch, _OfBranch(forward.step.index))
        known = branch.captured.get(block.index)
        if known is not None:
            if known.counted is not self.session.engine.backends_used:
                known.counted = self.session.engine.backends_used
                return block.inner(*args, **kwargs)
            if self._serves(known.served, forward, block) and known.given_form == form and known.likeness.holds():
                if self._fill(of_run.slots, known, tensors):
                    return self._replay(known, forward)
                return block.inner(*args, **kwargs)
            del branch.captured[block.index]
        ran = branch.ran.pop(block.index, None)
        if ran is None or not self._serves(ran.served, forward, block):
            return self._run(block, branch, forward, args, kwargs)
        try:
            captured = self._capture(block, of_run, ran, forward, tensors, form)
        except Exception as why:
            return self._fail(block, args, kwargs, why)
        branch.captured[block.index] = captured
        return self._replay(captured, forward)

    def end(self) -> None:
        """A forward has ended: what no later one replays goes, since what comes next wants the memory."""
        forward = self.session.forward
        if forward is None or forward.step.index is None:
            return
        step, is_last = forward.step, forward.step.index + 1 == forward.step.num_steps
        for of_run in self._thread.runs.get(forward.run, {}).values():
            if is_last:
                of_run.branches.pop(step.branch, None)
            elif step.branch in of_run.branches:
                of_run.branches[step.branch].latest = forward.step.index
        # Guidance may have ended, and one of two transformers may have done its share of the steps.
        for graphs in self.together:
            if graphs is self:
                graphs._drop_before(forward.step.index - 1, forward.run)
            else:
                graphs._drop_before(forward.step.index + 1 if is_last else forward.step.index - 1, None)

    def _drop_before(self, step: int, run: Run | None) -> None:
        """Drop branches of a run, or of this thread's, that ran last before a step."""
        for one, runs in list(self._thread.runs.items()):
            if run is not None and one is not run:
                continue
            for of_run in runs.values():
                of_run.branches = {name: kept for name, kept in of_run.branches.items() if kept.latest >= step}
            if not any(of_run.branches for of_run in runs.values()):
                self._thread.runs.pop(one)
                recorders = [of_run.recorder for of_run in runs.values()]
                runs.clear()
                for recorder in recorders:
                    recorder.release()

    def close(self) -> None:
        """Drop all graphs, in every thread."""
        self._thread = _Thread()

    def _of_run(self, forward: Forward, device: torch.device) -> _OfRun:
        place = device, _stream_of(device)
        runs = self._thread.runs.setdefault(forward.run, {})
        found = runs.get(place)
        if found is None:
            found = runs[place] = _OfRun(self._recorder(place))
        return found

    def _recorder(self, place: tuple[torch.device, int]) -> Recorder:
        """The one of this thread for a stream: graphs of two streams may run at once, and must share nothing."""
        recorders = self._thread.recorders
        if place not in recorders:
            used = {one for runs in self._thread.runs.values() for one in runs}
            for idle in recorders.keys() - used:  # whose memory would wait for graphs that nobody captures any more
                del recorders[idle]
            recorders[place] = self._recorder_of(place[0])
        return recorders[place]

    def _serves(self, served: dict[int, Served], forward: Forward, block: CapturedBlock) -> bool:
        return all(layer in served and served[layer].serves(self.session, forward, layer) for layer in block.layers)

    def _run(
        self,
        block: CapturedBlock,
        branch: _OfBranch,
        forward: Forward,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A block by itself, and how its layers were served."""
        served: dict[int, Served | str | None] = {}

        def watch(call: AttentionCall) -> None:
            again = call.layer in served  # sample by sample
            served[call.layer] = "samples are attended one by one" if again else Served.of(self.session.engine, call)

        forward.watch = watch
        try:
            out = block.inner(*args, **kwargs)
        finally:
            forward.watch = None
        for why in served.values():
            if isinstance(why, str):
                self._give_up(why)
                return out
        known = {layer: one for layer, one in served.items() if isinstance(one, Served)}
        if set(known) == set(block.layers):
            try:
                results, form = taken_apart(out)
            except CannotCapture as why:
                self._give_up(str(why))
                return out
            # Their sizes alone are of use.
            shapes = [torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="meta") for one in results]
            branch.ran[block.index] = _Ran(known, shapes, form)
        return out

    def _capture(
        self,
        block: CapturedBlock,
        of_run: _OfRun,
        ran: _Ran,
        forward: Forward,
        tensors: list[torch.Tensor],
        form: Form,
    ) -> Captured:
        likeness = Likeness(block.module)
        engine, device = self.session.engine, tensors[0].device
        slots = of_run.slots
        given: list[Slot] = []
        for tensor in tensors:
            given.append(slots.of_given(tensor, given))
        results: list[Slot] = []
        for like in ran.results:
            results.append(slots.for_result(like, device, [*given, *results]))
        for layer in block.layers:
            nans = engine.records[layer].replayed_nans
            if device not in nans:  # another thread may be faster
                nans.setdefault(device, torch.zeros((), dtype=torch.int64, device=device))
        for slot, tensor in zip(given, tensors, strict=True):
            if not slot.holds(tensor):
                slot.fill(tensor)
        versions = [slot.tensor._version for slot in given]
        args, kwargs = put_together(form, [slot.tensor for slot in given])

        def launch() -> None:
            out, out_form = taken_apart(block.inner(*args, **kwargs))
            if out_form != ran.results_form:
                raise CannotCapture("a block returned something of another form than before")
            for tensor, slot in zip(out, results, strict=True):
                slot.write(tensor)

        def watch(call: AttentionCall) -> None:
            if call.used.get(call.layer) is not ran.served[call.layer].kept:
                raise CannotCapture("a layer's plan changed while it was captured")

        held: Held = {}
        calls, forward.watch = dict(forward.calls), watch
        try:
            with engine.planner.of_graphs.instead(held):
                graph = of_run.recorder.capture(launch)
        finally:  # nothing has run yet
            forward.calls, forward.watch = calls, None
        if versions != [slot.tensor._version for slot in given]:
            raise CannotCapture("a block changes what it is given")
        return Captured(graph, likeness, ran.served, given, form, results, ran.results_form, held, engine.backends_used)

    @staticmethod
    def _fill(slots: Slots, captured: Captured, tensors: list[torch.Tensor]) -> bool:
        """Put what a block is given where its graph reads it; False where something else that is needed lies there, or
        where the graph would write."""
        moved = [(slot, tensor) for slot, tensor in zip(captured.given, tensors, strict=True) if not slot.holds(tensor)]
        if any(slots.is_result(slot) and not slot.is_free for slot, _ in moved):
            return False
        if not all(slot.is_free for slot in captured.results):
            return False
        for slot, tensor in moved:
            slot.fill(tensor)
        return True

    def _replay(self, captured: Captured, forward: Forward) -> Any:
        captured.graph.replay()
        engine = self.session.engine
        for layer, served in captured.served.items():
            forward.ordinal(layer, False)
            if served.density is None:
                engine.count_dense(layer, DENSE_LAYER, forward)
            else:
                engine.count_replayed(layer, served.density, forward)
        return put_together(captured.results_form, [slot.shown() for slot in captured.results])

    def _fail(self, block: CapturedBlock, args: tuple[Any, ...], kwargs: dict[str, Any], why: Exception) -> Any:
        """Run a block without a graph, and all from now on."""
        self._give_up(f"{why}" if isinstance(why, CannotCapture) else f"{type(why).__name__}: {why}")
        return block.inner(*args, **kwargs)

    def _give_up(self, why: str) -> None:
        self._failed = True
        self.close()
        what = why.partition("\n")[0].rstrip(".")
        self.session.engine.note(f"Blocks run without CUDA graphs: {what}.", lasting=True)


def _stream_of(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


class CapturedBlock:
    """Stands where torch.compile puts compiled code: around a block's forward and hooks, within a cache's decision.

    Attributes:
        inner: the block as it was, compiled or not.
        index: of the block among those of its transformer.
        layers: the self-attention layers in it.
    """

    def __init__(
        self, graphs: BlockGraphs, module: nn.Module, inner: Callable[..., Any], index: int, layers: tuple[int, ...]
    ) -> None:
        self.graphs = graphs
        self._module = weakref.ref(module)
        self.inner = inner
        self.index = index
        self.layers = layers

    @property
    def module(self) -> nn.Module:
        module = self._module()
        assert module is not None
        return module

    @property
    def is_in_place(self) -> bool:
        """Whether calls of the block come here."""
        module = self._module()
        return module is not None and module._compiled_call_impl is self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.inner(*args, **kwargs)
        return self.graphs.call(self, args, kwargs)
