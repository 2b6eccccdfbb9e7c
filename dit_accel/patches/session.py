"""One patched transformer: its engine, its family, and which forward of which run is under way in each thread."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..call import AttentionCall, AttentionInputs
from ..engine import Engine
from ..heads import HeadShard
from ..layout import TokenLayout
from ..ring import RingShard
from ..step_log import Begun, StepLog
from .ambient import EAGER, LatentTokens
from .families import Family
from .forwards import KEPT_FORWARDS, Forward, KeptForwards, addresses_of, in_backward
from .parallel_watch import Watch
from .placement import ReadPlaces, place_latents
from .progress import PipelineSchedules, RunTracker, running_pipeline
from .shards import heads_of_tensor_parallel, splits_text

if TYPE_CHECKING:
    from .reuse.tracker import ReuseTracker

CPU = torch.device("cpu")

# The opaque operator finds its session by id: a graph can hold a tensor, not a Python object.
_sessions: weakref.WeakValueDictionary[int, Session] = weakref.WeakValueDictionary()
_ids = itertools.count()


def session_of(session_id: int) -> Session | None:
    """The live session with this id, or None after its patch was removed."""
    return _sessions.get(session_id)


class _Thread(threading.local):
    """What a session knows in one thread."""

    def __init__(
        self, model: weakref.ref[nn.Module], pipe: weakref.ref[Any] | None, schedules: PipelineSchedules
    ) -> None:
        self.runs = RunTracker(model, pipe, schedules)
        self.places = ReadPlaces()
        self.forward: Forward | None = None
        # What a backward repeats: the whole transformer of a forward, or a compiled block of it.
        self.whole: Forward | None = None
        self.block: Forward | None = None
        # Number of the forward that the latest call belongs to, and the call's ordinal in its layer.
        self.served: tuple[int, int] | None = None
        # Where the forward is recorded, when it began, and on which device.
        self.recorded: tuple[StepLog, Begun, torch.device] | None = None


class Session:
    """State of one patched transformer.

    Args:
        engine: runs the attention calls.
        family: knows the model.
        patch_size: latent size of a token (frames, height, width).
        model: the transformer.
        pipe: the patched pipeline; None for a bare transformer.
        schedules: shared by the sessions of a patch.
    """

    def __init__(
        self,
        engine: Engine,
        family: Family,
        patch_size: tuple[int, int, int],
        model: nn.Module,
        pipe: Any,
        schedules: PipelineSchedules,
    ) -> None:
        self.id = next(_ids)
        self.engine = engine
        self.family = family
        self.patch_size = patch_size
        self.reuse: ReuseTracker | None = None
        self._origin = (weakref.ref(model), None if pipe is None else weakref.ref(pipe), schedules)
        self._thread = _Thread(*self._origin)
        self._numbers = itertools.count()
        self._forwards = KeptForwards()
        # Of which configuration diffusers' hooks were looked at, and what they split.
        self._split: tuple[Any, bool] | None = None
        self._watch: Watch | None = None
        _sessions[self.id] = self

    def begin_forward(
        self,
        latents: LatentTokens | None,
        timestep: torch.Tensor | None,
        inputs: Sequence[torch.Tensor] = (),
        traced: bool = False,
    ) -> None:
        """Called when a forward of the transformer starts in this thread.

        Args:
            latents: where the latent tokens are.
            timestep: as the transformer is given it.
            inputs: all tensors that the transformer is given, by which its repetition is recognised.
            traced: whether one graph holds the whole forward.
        """
        thread = self._thread
        thread.whole = self._forwards.given(inputs) if in_backward() else None
        if thread.whole is not None:
            thread.forward = None
            return
        number = next(self._numbers)
        run, step, unknown = thread.runs.next_forward(number, EAGER.branch, timestep)
        if latents is not None and latents.ids is not None:
            latents = thread.places.place(self.family, latents, None if step.index is None else run)
        if unknown is not None and self.engine.recipe.schedule.follows_steps:
            self.engine.note(f"The denoising step is unknown: {unknown}. Plans are made as for a bare transformer.")
        thread.forward = Forward(number, run, step, latents, traced)
        # A graph's operators run below autograd and cannot know whether gradients will be asked for.
        if traced or torch.is_grad_enabled():
            thread.forward.given = addresses_of(inputs)
            self._forwards.add(thread.forward)
        steps = self.engine.steps
        if steps is not None and self.engine.switched_on:
            device = inputs[0].device if inputs else CPU
            if traced:  # whose end nobody announces
                steps.end_forward(thread.forward, False, None, device)
            else:
                thread.recorded = (steps, steps.start(device), device)

    @property
    def forward(self) -> Forward | None:
        """The eager forward that this thread runs."""
        return self._thread.forward

    def running_pipeline(self) -> Any | None:
        """The pipeline that calls the transformer in this thread; None outside any."""
        model = self._origin[0]()
        return None if model is None else running_pipeline(model)

    def watch_others(self) -> Watch:
        """Called by a call that processes share: whether another of them fails in this forward."""
        if self._watch is None:
            self._watch = Watch(str(self.id))
        if not self._watch.watching:
            self._watch.enter()
        return self._watch

    def end_forward(self, error: BaseException | None = None) -> None:
        """Called when an eager forward of the transformer ends, also by an exception."""
        if self._watch is not None:
            self._watch.leave(error)
        thread = self._thread
        if thread.recorded is not None:
            steps, begun, device = thread.recorded
            if thread.forward is not None and error is None:
                reuse = thread.forward.reuse
                steps.end_forward(thread.forward, reuse is not None and reuse.skipped, begun, device)
            thread.recorded = None
        thread.forward = thread.whole = None

    def enter_module(self, tensor: torch.Tensor | None) -> None:
        """Called when a block or an attention layer starts, with the first tensor that it is given, by which it is
        recognised when checkpointing repeats it."""
        forward = self._thread.forward
        if tensor is not None and forward is not None and forward in self._forwards:
            forward.inputs.update(addresses_of([tensor]))

    @contextmanager
    def compiled_block(self, tensor: torch.Tensor | None) -> Iterator[None]:
        """Around an attention call of a compiled block, whose frames do not show what the block was given."""
        self.enter_module(tensor)
        if tensor is not None and in_backward():
            self._thread.block = self._forwards.with_input(tensor)
        try:
            yield
        finally:
            self._thread.block = None

    def attend(
        self,
        layer: int,
        inputs: AttentionInputs,
        latents: LatentTokens | None,
        dense: Callable[[], torch.Tensor],
        learned: Sequence[torch.Tensor] | None = None,
        heads: HeadShard | None = None,
        ring: RingShard | None = None,
    ) -> torch.Tensor:
        """One intercepted call, (B, S, H, D); see :meth:`dit_accel.engine.Engine.attend`.

        ``latents`` are what a graph of the whole transformer holds; None in eager code and in compiled blocks, whose
        transformer's hook has said where the latents are. ``heads`` and ``ring`` are those of the call, where
        several processes share a layer's heads or tokens; a mask is of all tokens, in the model's order.
        """
        q_len, kv_len = inputs.q.size(1), inputs.k.size(1)
        if ring is not None:
            q_len = kv_len = ring.total
        if heads is None and ring is None:
            heads = self._heads_of_tensor_parallel(inputs.q.size(2))
        thread = self._thread
        forward, repeated = self._forward(layer, kv_len, latents)
        thread.served = None
        if q_len != kv_len and not (self.family.latents_query and q_len < kv_len and heads is None):
            return self.pass_by(layer, "keys and queries differ in number", dense)
        if forward is None:
            return self.pass_by(layer, "called outside a forward of its transformer", dense)
        # A call without the latents, as of a prompt before its keys are cached, is no sample of its layer.
        placed = isinstance(self.layout(forward, kv_len, inputs.attn_mask is not None), TokenLayout)
        ordinal = forward.ordinal(layer, repeated) if placed else 0
        thread.served = (forward.number, ordinal)
        call = self._call(forward, ordinal, layer, inputs, repeated, ring)
        call.heads = heads
        out = self.engine.attend(call, dense, learned)
        if forward.watch is not None:
            forward.watch(call)
        return out

    def enter_traced(self, layer: int, latents: LatentTokens) -> None:
        """Called by a layer's call in a graph of the whole transformer, whose forward no hook announced."""
        thread = self._thread
        if thread.forward is None or not thread.forward.traced or layer in thread.forward.attended:
            self.begin_forward(latents, None, traced=True)
        assert thread.forward is not None
        thread.forward.attended.add(layer)

    def streams(self, layer: int, seq_len: int, masked: bool, number: int | None = None) -> tuple[int, ...] | str:
        """Tokens of the streams that diffusers' context parallelism splits each by itself, in the order of a sequence
        of ``seq_len`` tokens; or the reason why they are not known.

        ``number`` is of the forward that a graph repeats; None for the one that runs.
        """
        forward = self._forward(layer, seq_len, None)[0] if number is None else self._forwards.numbered(number)
        latents = None if forward is None else forward.latents
        text = 0 if latents is None else seq_len - latents.tokens
        if latents is None or text <= 0 or seq_len == prod(latents.grid) or not self._splits_text():
            return (seq_len,)
        if masked and self.family.masked != "there":
            return "a mask moves the text under context parallelism"
        return (text, latents.tokens) if self.family.text_first else (latents.tokens, text)

    @property
    def parallel_config(self) -> Any | None:
        """diffusers' ``ParallelConfig`` of the transformer."""
        return getattr(self._origin[0](), "_parallel_config", None)

    def _splits_text(self) -> bool:
        model, config = self._origin[0](), self.parallel_config
        assert model is not None
        if self._split is None or self._split[0] is not config or config is None:
            self._split = (config, splits_text(model))
        return self._split[1]

    def _heads_of_tensor_parallel(self, number: int) -> HeadShard | None:
        config = self.parallel_config
        if config is None:
            return None
        of_model = getattr(self._origin[0](), "config", None)
        shard = heads_of_tensor_parallel(config, number, getattr(of_model, "num_attention_heads", None))
        if shard is not None:
            if self.engine.learned or self.engine.routers:
                raise ValueError(
                    "What a recipe has learned belongs to all heads of a layer, and tensor parallelism shares them "
                    "out: generate in one process, or patch without the compensation."
                )
            self.engine.parallel[
                f"tensor parallel: {shard.ranks} ranks, this rank's heads {shard.first} to "
                f"{shard.first + number - 1} of {shard.total}"
            ] = None
        return shard

    def pass_by(self, layer: int, reason: str, dense: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A call that no plan can serve, by the model's own attention, counted with the reason."""
        return dense() if self._is_repetition() else self.engine.pass_by(layer, reason, dense, self.forward)

    def count_dense(self, layer: int, reason: str) -> None:
        """Count a call of this layer that was not sparse."""
        if self.counts():
            self.engine.count_dense(layer, reason, self.forward)

    def counts(self) -> bool:
        """Whether a call is counted: not where all go to the model's own attention, nor when it is repeated."""
        return self.engine.switched_on and not self._is_repetition()

    def repeat(
        self,
        number: int,
        ordinal: int,
        layer: int,
        inputs: AttentionInputs,
        dense: Callable[[], torch.Tensor],
        learned: Sequence[torch.Tensor] | None = None,
        heads: HeadShard | None = None,
        ring: RingShard | None = None,
    ) -> torch.Tensor:
        """A layer's call number ``ordinal`` of the forward ``number`` again, for its gradients; dense if it was of no
        forward (-1). ``heads`` and ``ring`` are as for :meth:`attend`.

        Raises:
            RuntimeError: so many forwards came since that it is no longer known.
        """
        if number < 0:
            return dense()
        forward = self._forwards.numbered(number)
        if forward is None:
            raise RuntimeError(
                f"The gradients of a forward can be asked for until {KEPT_FORWARDS} others have begun, and this one "
                "is older; call backward earlier."
            )
        call = self._call(forward, ordinal, layer, inputs, True, ring)
        call.heads = heads
        return self.engine.attend(call, dense, learned)

    def served(self) -> tuple[int, int]:
        """Number of the forward that this thread's latest call belongs to, -1 for none, and which of its layer's calls
        it is."""
        return self._thread.served or (-1, 0)

    def close(self) -> None:
        """Drop all that is kept of runs, in every thread."""
        self.engine.planner.forget()
        self.engine.run.forget()
        self._forwards.clear()
        self._split = None
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        self._thread = _Thread(*self._origin)

    def _forward(self, layer: int, seq_len: int, latents: LatentTokens | None) -> tuple[Forward | None, bool]:
        """The forward of a call, and whether the call is repeated for its gradients."""
        thread = self._thread
        if latents is not None and not in_backward():
            self.enter_traced(layer, latents)
        if self._is_repetition():
            known = thread.whole or thread.block or self._forwards.on_stack()
            return known or self._forwards.alike(layer, seq_len, self.layout), True
        return thread.forward, False

    def _is_repetition(self) -> bool:
        forward = self._thread.forward
        # Nobody announces the end of a traced forward; a backward comes after it.
        return in_backward() and (forward is None or forward.traced)

    def _call(
        self,
        forward: Forward,
        ordinal: int,
        layer: int,
        inputs: AttentionInputs,
        repeated: bool,
        ring: RingShard | None = None,
    ) -> AttentionCall:
        """A layer's call number ``ordinal`` of a forward."""
        q_len, kv_len = inputs.q.size(1), inputs.k.size(1)
        if ring is not None:
            q_len = kv_len = ring.total
        layout = self.layout(forward, kv_len, inputs.attn_mask is not None)
        if isinstance(layout, TokenLayout):
            if q_len < kv_len:
                layout = replace(layout, queries=(kv_len - q_len if self.family.text_first else 0, q_len))
            if self.family.masks_pairs and inputs.attn_mask is not None:
                inputs = inputs._replace(attn_mask=forward.mask_of_keys(inputs.attn_mask, layout))
            if self.family.adds_pairs and inputs.attn_mask is not None:
                inputs = inputs._replace(attn_mask=forward.mask_of_bits(inputs.attn_mask))
        step, used = forward.step, forward.used
        if ordinal:
            # Another sample: nothing of the first one's holds for it.
            step = replace(step, branch=f"{step.branch or ''}[{ordinal}]")
            used = forward.used_later.setdefault(ordinal, {})
        return AttentionCall.of(layer, inputs, layout, step, forward.run, used, repeated, ring)

    def layout(self, forward: Forward, seq_len: int, masked: bool = False) -> TokenLayout | str:
        layout = forward.layouts.get((seq_len, masked))
        if layout is None:
            latents = forward.latents
            layout = "the latent grid is unknown"
            if latents is not None:
                layout = place_latents(self.family, latents, seq_len, masked)
            if isinstance(layout, TokenLayout) and not self.engine.recipe.spans_references:
                layout = layout.without_references()
            forward.layouts[seq_len, masked] = layout
        return layout
