"""A transformer's blocks, which are captured when what they do stays the same from one step to the next.

A graph lives within a run: between runs weights, adapters and sizes may change, and to capture a block takes no longer
than to run it once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...call import AttentionCall
from ...kernels.common.launch import is_captured
from ...stages.schedule import DENSE_LAYER
from ..forwards import Forward
from ..session import Session
from .arguments import CannotCapture, Form, taken_apart
from .captured import Captured, Ran, capture
from .conditions import OF_INFERENCE, why_not_now
from .kept import KeptGraphs, OfBranch, RecorderOf
from .recorder import CudaRecorder
from .served import Served


class BlockGraphs:
    """The graphs of one transformer's blocks, in all threads.

    Args:
        session: of the patched transformer.
        recorder_of: captures on a device, for its current stream.

    Attributes:
        kept: what runs keep.
        together: those of all transformers of a pipeline, this one's too.
    """

    device_type = "cuda"

    def __init__(self, session: Session, recorder_of: RecorderOf = CudaRecorder) -> None:
        self.session = session
        self.kept = KeptGraphs(recorder_of)
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
                self._note(why_not)
            return block.inner(*args, **kwargs)
        try:
            tensors, form = taken_apart((args, kwargs))
            self._refuse(block, forward, tensors)
        except CannotCapture as why:
            self._give_up(str(why))
            return block.inner(*args, **kwargs)
        if any(tensor.is_inference() for tensor in tensors):
            self._note(OF_INFERENCE)
            return block.inner(*args, **kwargs)
        if not tensors or is_captured(tensors[0].device):  # by somebody else
            return block.inner(*args, **kwargs)
        return self._replayed_or_run(block, forward, args, kwargs, tensors, form)

    def end(self) -> None:
        """A forward has ended: what no later one replays goes."""
        forward = self.session.forward
        if forward is None or forward.step.index is None:
            return
        index, is_last = forward.step.index, forward.step.index + 1 == forward.step.num_steps
        self.kept.end_step(forward.run, forward.step)
        for graphs in self.together:
            if graphs is not self:  # one of two transformers may have done its share of the steps
                graphs.kept.drop_before(index + 1 if is_last else index - 1)

    def close(self) -> None:
        """Drop all graphs, in every thread."""
        self.kept.clear()

    def _refuse(self, block: CapturedBlock, forward: Forward, tensors: list[torch.Tensor]) -> None:
        if any(layer in forward.calls for layer in block.layers):
            raise CannotCapture("a block runs more than once in a forward")
        for tensor in tensors:
            if tensor.device.type != self.device_type:
                raise CannotCapture(f"a block is given a tensor on {tensor.device}")

    def _replayed_or_run(
        self,
        block: CapturedBlock,
        forward: Forward,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[torch.Tensor],
        form: Form,
    ) -> Any:
        assert forward.step.index is not None
        of_run = self.kept.of_run(forward.run, tensors[0].device)
        branch = of_run.branches.setdefault(forward.step.branch, OfBranch(forward.step.index))
        known, used = branch.captured.get(block.index), self.session.engine.backends_used
        if known is not None:
            if known.counted is not used:
                known.counted = used
                return block.inner(*args, **kwargs)
            if self._serves(known.served, forward, block) and known.given_form == form and known.likeness.holds():
                if known.takes(of_run.slots, tensors):
                    return self._replay(known, forward)
                return block.inner(*args, **kwargs)
            del branch.captured[block.index]
        ran = branch.ran.pop(block.index, None)
        if ran is None or not self._serves(ran.served, forward, block):
            return self._run(block, branch, forward, args, kwargs)
        try:
            engine, slots, recorder = self.session.engine, of_run.slots, of_run.recorder
            captured = capture(block.module, block.inner, ran, tensors, form, slots, recorder, engine, forward)
        except Exception as why:
            self._give_up(str(why) if isinstance(why, CannotCapture) else f"{type(why).__name__}: {why}")
            return block.inner(*args, **kwargs)
        branch.captured[block.index] = captured
        return self._replay(captured, forward)

    def _serves(self, served: dict[int, Served], forward: Forward, block: CapturedBlock) -> bool:
        return all(layer in served and served[layer].serves(self.session, forward, layer) for layer in block.layers)

    def _run(
        self,
        block: CapturedBlock,
        branch: OfBranch,
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
        never = next((why for why in served.values() if isinstance(why, str)), None)
        known = {layer: one for layer, one in served.items() if isinstance(one, Served)}
        if never is not None:
            self._give_up(never)
        elif set(known) == set(block.layers):
            try:
                branch.ran[block.index] = Ran.of(known, out)
            except CannotCapture as why:
                self._give_up(str(why))
        return out

    def _replay(self, captured: Captured, forward: Forward) -> Any:
        out, engine = captured.replay(), self.session.engine
        for layer, served in captured.served.items():
            forward.ordinal(layer, False)
            shares = captured.shares_of(layer)
            if shares is None:
                engine.count_dense(layer, DENSE_LAYER, forward)
            else:
                engine.count_replayed(layer, shares, int(served.makes_plan), forward)
        return out

    def _give_up(self, why: str) -> None:
        """Blocks run without graphs from now on."""
        self._failed = True
        self.close()
        self._note(why.partition("\n")[0].rstrip("."), lasting=True)

    def _note(self, why: str, lasting: bool = False) -> None:
        self.session.engine.note(f"Blocks run without CUDA graphs: {why}.", lasting)


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
