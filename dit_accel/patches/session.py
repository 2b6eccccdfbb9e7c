"""One patched transformer: its engine, its family, and which forward of which run is under way in each thread."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..engine import Engine
from ..layout import StepContext, TokenLayout
from ..run import Run
from .ambient import EAGER, LatentTokens
from .families import Family
from .progress import PipelineSchedules, RunTracker

# The opaque operator finds its session by id: a graph can hold a tensor, not a Python object.
_sessions: weakref.WeakValueDictionary[int, Session] = weakref.WeakValueDictionary()
_ids = itertools.count()
# Forwards whose gradients may still be asked for. Each holds references to plans, not plans of its own.
KEPT_FORWARDS = 64


def session_of(session_id: int) -> Session | None:
    """The live session with this id, or None after its patch was removed."""
    return _sessions.get(session_id)


@dataclass(eq=False)
class Forward:
    """One forward of the transformer.

    Attributes:
        number: counts the forwards of the transformer.
        run, step: where it belongs.
        latents: where the latent tokens are; None if unknown.
        traced: whether it runs inside one graph, whose end nobody announces.
        last_layer: the layer that attended last.
        inputs: addresses of the tensors that blocks and attention layers were given: a checkpointed module is repeated
            with the very same tensor, and while that lives no other has its address.
        used: kept plans that its layers used.
        layouts: of its sequences, by length.
    """

    number: int
    run: Run
    step: StepContext
    latents: LatentTokens | None
    traced: bool = False
    last_layer: int = -1
    inputs: set[int] = field(default_factory=set)
    used: dict[int, Any] = field(default_factory=dict)
    layouts: dict[int, TokenLayout | str] = field(default_factory=dict)


class _Thread(threading.local):
    """What a session knows in one thread."""

    def __init__(
        self, model: weakref.ref[nn.Module], pipe: weakref.ref[Any] | None, schedules: PipelineSchedules
    ) -> None:
        self.runs = RunTracker(model, pipe, schedules)
        self.forward: Forward | None = None
        # The forward that a checkpointed block repeats, between the block's hooks.
        self.repeated: Forward | None = None


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
        self._origin = (weakref.ref(model), None if pipe is None else weakref.ref(pipe), schedules)
        self._thread = _Thread(*self._origin)
        self._numbers = itertools.count()
        self._forwards: OrderedDict[int, Forward] = OrderedDict()
        self._lock = threading.Lock()
        _sessions[self.id] = self

    def begin_forward(self, latents: LatentTokens | None, timestep: torch.Tensor | None, traced: bool = False) -> None:
        """Called when a forward of the transformer starts in this thread."""
        if latents is not None and latents.ids is not None:
            # One small copy to the host per forward.
            latents = self.family.place(latents)
        number = next(self._numbers)
        run, step, unknown = self._thread.runs.next_forward(number, EAGER.branch, timestep)
        if unknown is not None and self.engine.recipe.schedule.follows_steps:
            self.engine.note(f"The denoising step is unknown: {unknown}. Plans are made as for a bare transformer.")
        forward = self._thread.forward = Forward(number, run, step, latents, traced)
        self._thread.repeated = None
        # A graph's operators run below autograd and cannot know whether gradients will be asked for.
        if traced or torch.is_grad_enabled():
            with self._lock:
                # What its repetition needs, without the run and all that it keeps.
                self._forwards[number] = replace(forward, run=Run())
                while len(self._forwards) > KEPT_FORWARDS:
                    self._forwards.popitem(last=False)

    def end_forward(self) -> None:
        """Called when an eager forward of the transformer ends, also by an exception."""
        self._thread.forward = None

    def enter_module(self, tensor: torch.Tensor | None, is_block: bool) -> None:
        """Called when a block or an attention layer starts, with the first tensor that it is given.

        Outside a forward this is a checkpointed module that is repeated for its gradients: its input tells of which
        forward it was a part.
        """
        if tensor is None:
            return
        address, forward = tensor.data_ptr(), self._thread.forward
        if forward is not None:
            if forward.number in self._forwards:
                forward.inputs.add(address)
            return
        with self._lock:
            known = next((one for one in reversed(self._forwards.values()) if address in one.inputs), None)
        # The input of an attention layer inside a repeated block is new, and tells nothing.
        if known is not None or is_block:
            self._thread.repeated = known

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attn_mask: torch.Tensor | None,
        scale: float | None,
        latents: LatentTokens | None,
        dense: Callable[[], torch.Tensor],
        learned: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """One intercepted call, (B, S, H, D); see :meth:`dit_accel.engine.Engine.attend`.

        ``latents`` are what a graph of the whole transformer holds; None in eager code and in compiled blocks, whose
        transformer's hook has said where the latents are.
        """
        forward, record = self._forward(layer, latents)
        if forward is None:
            forward = self._only_forward_with(q.shape[1])
        if forward is None:
            return self.engine.pass_by(layer, "called outside a forward of its transformer", dense)
        return self._attend(forward, layer, q, k, v, attn_mask, scale, dense, record, learned)

    def repeat(
        self,
        number: int,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attn_mask: torch.Tensor | None,
        scale: float | None,
        dense: Callable[[], torch.Tensor],
        learned: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """A call of the forward ``number`` again, for its gradients.

        Raises:
            RuntimeError: so many forwards came since that it is no longer known.
        """
        forward = self._only_forward_with(q.shape[1]) if number < 0 else self._forwards.get(number)
        if forward is None:
            raise RuntimeError(
                f"The gradients of a forward can be asked for until {KEPT_FORWARDS} others have begun, and this one "
                "is older; call backward earlier."
            )
        return self._attend(forward, layer, q, k, v, attn_mask, scale, dense, False, learned)

    def forward_number(self) -> int:
        """Number of the forward that this thread runs or repeats; -1 for none."""
        forward = self._thread.forward or self._thread.repeated
        return -1 if forward is None else forward.number

    def close(self) -> None:
        """Drop all that is kept of runs, in every thread."""
        self.engine.planner.forget()
        self.engine.run.forget()
        self._forwards.clear()
        self._thread = _Thread(*self._origin)

    def _forward(self, layer: int, latents: LatentTokens | None) -> tuple[Forward | None, bool]:
        """The forward of a call, and whether the call is its first, not a repetition."""
        forward = self._thread.forward
        if latents is not None and (forward is None or not forward.traced or layer <= forward.last_layer):
            # The whole transformer is compiled: no hook announced this forward.
            self.begin_forward(latents, None, traced=True)
            forward = self._thread.forward
        if forward is not None:
            forward.last_layer = layer
            return forward, True
        return self._thread.repeated, False

    def _only_forward_with(self, seq_len: int) -> Forward | None:
        """The latest forward of so many tokens, if all such forwards have one latent grid.

        A last resort for blocks whose saved inputs were moved, and so cannot be recognised.

        Raises:
            RuntimeError: they have several.
        """
        with self._lock:
            fits = [
                one for one in self._forwards.values() if isinstance(self._layout(one.latents, seq_len), TokenLayout)
            ]
        layouts = {self._layout(one.latents, seq_len) for one in fits}
        if len(layouts) > 1:
            raise RuntimeError(
                f"Cannot tell of which forward this repeated block of {seq_len} tokens was a part: "
                f"{len(layouts)} latent grids have as many. Call backward before a forward of another size."
            )
        return fits[-1] if fits else None

    def _attend(
        self,
        forward: Forward,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attn_mask: torch.Tensor | None,
        scale: float | None,
        dense: Callable[[], torch.Tensor],
        record: bool,
        learned: Sequence[torch.Tensor] | None,
    ) -> torch.Tensor:
        layout = forward.layouts.get(q.shape[1])
        if layout is None:
            layout = forward.layouts[q.shape[1]] = self._layout(forward.latents, q.shape[1])
        return self.engine.attend(
            layer, q, k, v, attn_mask, scale, layout, forward.step, dense, record, learned, forward.run, forward.used
        )

    def _layout(self, latents: LatentTokens | None, seq_len: int) -> TokenLayout | str:
        return "the latent grid is unknown" if latents is None else self._place(latents, seq_len)

    def _place(self, latents: LatentTokens, seq_len: int) -> TokenLayout | str:
        extra = seq_len - latents.tokens
        if len(latents.grid) != 3 or extra < 0:
            return f"{seq_len} tokens do not hold the latent grid {latents.grid}"
        start = latents.start + (extra if self.family.text_first else 0)
        return TokenLayout((latents.grid[0], latents.grid[1], latents.grid[2]), start, seq_len)
