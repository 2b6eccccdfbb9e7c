"""One forward of a transformer, and those whose blocks may yet be repeated for their gradients."""

from __future__ import annotations

import sys
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import _engine_run_backward

from ..layout import StepContext, TokenLayout
from ..run import Run
from .ambient import LatentTokens
from .masks import is_of_pairs, key_mask_of_pairs

if TYPE_CHECKING:
    from ..call import AttentionCall
    from .reuse.tracker import ForwardReuse

# Forwards whose gradients may still be asked for. Each holds references to plans, not plans of its own.
KEPT_FORWARDS = 64
Addresses = dict[int, "weakref.ref[torch.Tensor]"]
_running_backward = torch._C._current_graph_task_id  # looked up once: each call asks several times


def in_backward() -> bool:
    """Whether this thread runs autograd's backward: a module that is called there is repeated."""
    return _running_backward() != -1


def frames_of_repetition() -> Iterator[types.FrameType]:
    """This thread's frames since autograd's backward began, innermost first.

    What repeats a module may call no hook of it, and ends by an exception as soon as it has what it needs. The stack
    tells what is repeated all the same.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _engine_run_backward.__code__:
        yield frame
        frame = frame.f_back  # type: ignore[assignment]


@dataclass(eq=False)
class Forward:
    """One forward of the transformer.

    Attributes:
        number: counts the forwards of the transformer.
        run, step: where it belongs.
        latents: where the latent tokens are; None if unknown.
        traced: whether it runs inside one graph, whose end nobody announces.
        attended: the layers that have attended, of a traced one.
        given: all that the transformer was given.
        inputs: what blocks and attention layers were given first, by address.
        used: kept plans that its layers used.
        used_later: the same of a layer's second and further calls, where its processor goes through the batch sample by
            sample, by ordinal.
        calls, repeats: how often each layer has attended, and again for its gradients.
        layouts: of its sequences, by length and by whether they are masked.
        key_masks: boolean masks that its masks of pairs stand for, by their shape; None for one that says more.
        reuse: what a cache knows of it; None where all blocks run.
        watch: sees each call that has run; None where nobody asks.
    """

    number: int
    run: Run
    step: StepContext
    latents: LatentTokens | None
    traced: bool = False
    attended: set[int] = field(default_factory=set)
    given: Addresses = field(default_factory=dict)
    inputs: Addresses = field(default_factory=dict)
    used: dict[int, Any] = field(default_factory=dict)
    used_later: dict[int, dict[int, Any]] = field(default_factory=dict)
    calls: dict[int, int] = field(default_factory=dict)
    repeats: dict[int, int] = field(default_factory=dict)
    layouts: dict[tuple[int, bool], TokenLayout | str] = field(default_factory=dict)
    key_masks: dict[torch.Size, torch.Tensor | None] = field(default_factory=dict)
    reuse: ForwardReuse | None = None
    watch: Callable[[AttentionCall], None] | None = None

    def ordinal(self, layer: int, repeated: bool) -> int:
        """How many calls of a layer came before the one that begins, within the forward or its repetition."""
        counts = self.repeats if repeated else self.calls
        ordinal = counts.get(layer, 0)
        counts[layer] = ordinal + 1
        return ordinal % max(self.calls.get(layer, 0), 1) if repeated else ordinal

    def mask_of_keys(self, mask: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """A mask of pairs as a key mask where it is no more than that, looked at once a forward."""
        if not is_of_pairs(mask, layout.seq_len):
            return mask
        if mask.shape not in self.key_masks:
            self.key_masks[mask.shape] = key_mask_of_pairs(mask, layout)
        keys = self.key_masks[mask.shape]
        return mask if keys is None else keys

    def mask_of_bits(self, mask: torch.Tensor) -> torch.Tensor:
        """A mask that is added to the logits as the boolean one that it stands for, made once a forward."""
        if mask.dtype == torch.bool:
            return mask
        bits = self.key_masks.get(mask.shape)
        if bits is None:
            bits = self.key_masks[mask.shape] = mask > torch.finfo(mask.dtype).min / 2
        return bits


def addresses_of(tensors: Iterable[torch.Tensor]) -> Addresses:
    """Tensors by address.

    Checkpointing keeps what it repeats a module with. While that lives no other tensor has its address; an address of
    a tensor that is gone says nothing.
    """
    return {tensor.data_ptr(): weakref.ref(tensor) for tensor in tensors}


def _holds(addresses: Addresses, tensor: torch.Tensor) -> bool:
    held = addresses.get(tensor.data_ptr())
    return held is not None and held() is not None


class KeptForwards:
    """The latest forwards of a transformer that ran with gradients, in any thread."""

    def __init__(self) -> None:
        self._entries: OrderedDict[int, Forward] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, forward: Forward) -> bool:
        return forward.number in self._entries

    def add(self, forward: Forward) -> None:
        """Keep what its repetition needs, without the run and all that it keeps."""
        with self._lock:
            self._entries[forward.number] = replace(forward, run=Run())
            while len(self._entries) > KEPT_FORWARDS:
                self._entries.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def numbered(self, number: int) -> Forward | None:
        """The forward with this number; None if it is forgotten."""
        with self._lock:
            return self._entries.get(number)

    def given(self, tensors: Sequence[torch.Tensor]) -> Forward | None:
        """The latest forward whose transformer was given all of these; None without any tensor."""
        if not tensors:
            return None
        with self._lock:
            newest_first = reversed(self._entries.values())
            return next((one for one in newest_first if all(_holds(one.given, each) for each in tensors)), None)

    def with_input(self, tensor: torch.Tensor) -> Forward | None:
        """The latest forward with a block or attention layer that was given this tensor."""
        with self._lock:
            return next((one for one in reversed(self._entries.values()) if _holds(one.inputs, tensor)), None)

    def on_stack(self) -> Forward | None:
        """The forward with the input that checkpointing repeats a module with, in whatever variable that is."""
        for frame in frames_of_repetition():
            for value in list(frame.f_locals.values()):
                for tensor in value if isinstance(value, (tuple, list)) else (value,):
                    known = self.with_input(tensor) if isinstance(tensor, torch.Tensor) else None
                    if known is not None:
                        return known
        return None

    def alike(self, layer: int, seq_len: int, layout: Callable[[Forward, int], TokenLayout | str]) -> Forward | None:
        """The latest forward with so many tokens, if this layer would do the same in all such forwards.

        A last resort for blocks whose saved inputs were moved, and so cannot be recognised.

        Args:
            layout: of a forward's sequence of a length.

        Raises:
            RuntimeError: they differ.
        """
        with self._lock:
            known = list(self._entries.values())
        fits = [one for one in known if isinstance(layout(one, seq_len), TokenLayout)]
        ways = {
            (layout(one, seq_len), one.step.index, one.step.num_steps, one.step.sigma, id(one.used.get(layer)))
            for one in fits
        }
        if len(ways) > 1:
            raise RuntimeError(
                f"Cannot tell of which forward this repeated block of {seq_len} tokens was a part: {len(fits)} "
                "forwards have as many, of another latent grid, step or plan. Call backward after each forward, or "
                "leave what checkpointing saves where it is."
            )
        return fits[-1] if fits else None
