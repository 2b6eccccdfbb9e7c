"""A denoising run, and what is kept from one of its forwards to the next."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar, cast

import torch

from .kernels.common.launch import is_captured
from .layout import StepContext, TokenLayout
from .plan import LayerMemory

KeptT = TypeVar("KeptT")

# Two guidance branches with a key mask each, at two sizes; a training of varied sizes keeps no more.
KEPT_PLACES = 8


class Bounded(Generic[KeptT]):
    """A dictionary that forgets the entry not asked for longest. Threads may share it."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.entries: OrderedDict[Hashable, KeptT] = OrderedDict()
        self._lock = threading.Lock()
        # The last of the entries: every layer of a forward asks for the same.
        self._newest: tuple[Hashable, KeptT] | None = None

    def get(self, key: Hashable, make: Callable[[], KeptT]) -> KeptT:
        """The entry of a key, made once if there is none."""
        newest = self._newest
        if newest is not None and newest[0] == key:
            return newest[1]
        with self._lock:
            if key in self.entries:
                self.entries.move_to_end(key)
            else:
                self.entries[key] = make()
                while len(self.entries) > self.places:
                    self.entries.popitem(last=False)
            found = self.entries[key]
            self._newest = key, found
            return found

    def clear(self) -> None:
        with self._lock:
            self.entries.clear()
            self._newest = None


@dataclass(eq=False)
class _Ran:
    """The latest forward in which a layer ran, and how many it ran in before."""

    latest: int
    before: int = 0


@dataclass(eq=False)
class Kept:
    """What calls of one layout under one key mask keep within a run, by layer and guidance branch."""

    plans: dict[Hashable, Any] = field(default_factory=dict)
    memories: dict[Hashable, LayerMemory] = field(default_factory=dict)
    ran: dict[Hashable, _Ran] = field(default_factory=dict)
    # A forward's step, and the same with the count of the forwards before: mostly that of all its layers.
    _aged: tuple[StepContext, StepContext] | None = None

    def apart(self) -> Kept:
        """The same, to which a call may add what no other call is to find."""
        memories = {key: replace(memory) for key, memory in self.memories.items()}
        return Kept(dict(self.plans), memories, {key: replace(ran) for key, ran in self.ran.items()})

    def forwards_before(self, layer: Hashable, forward_id: int) -> int:
        """In how many forwards before this one the layer ran, in a branch: a cache may have skipped it in others."""
        ran = self.ran.setdefault(layer, _Ran(forward_id))
        if ran.latest != forward_id:
            ran.latest, ran.before = forward_id, ran.before + 1
        return ran.before

    def aged(self, step: StepContext, layer: Hashable) -> StepContext:
        """The step of a forward, with the number of forwards before it in which the layer ran, in its branch."""
        before, known = self.forwards_before(layer, step.forward_id), self._aged
        if known is None or known[0] is not step or known[1].computed != before:
            known = self._aged = step, replace(step, computed=before)
        return known[1]


@dataclass(eq=False)
class _SeenMask:
    """The content of a key mask, its number, and the tensor that held it last with the forward that showed it."""

    number: int
    content: torch.Tensor
    held: torch.Tensor
    place: tuple[Hashable, ...]


class Run:
    """One denoising run in one thread, or successive forwards of a bare transformer.

    Plans, log-sum-exps and means belong to the run that made them: another run has a ``Run`` of its own and finds
    none of them. Dropping the object frees them.
    """

    def __init__(self) -> None:
        self._kept: Bounded[Kept] = Bounded(KEPT_PLACES)
        self._reused: Bounded[Any] = Bounded(KEPT_PLACES)
        self._masks: list[_SeenMask] = []
        self._numbers = itertools.count(1)

    def kept(self, layout: TokenLayout, key_mask: torch.Tensor | None, forward_id: int) -> Kept:
        """What is kept for calls of this layout whose key mask has the same content.

        Waits for the device once a forward where keys are masked: two prompts may hide different keys, and a plan
        must not serve both.

        Raises:
            RuntimeError: a CUDA graph is captured, and the mask is a tensor that was not seen before.
        """
        number = 0 if key_mask is None else self._number(key_mask, forward_id)
        return self._kept.get((layout, number), Kept)

    def knows(self, key_mask: torch.Tensor | None) -> bool:
        """Whether something may be kept of calls with this key mask: no forward has shown the content of another."""
        return key_mask is None or any(seen.place[1:] == _place(key_mask) for seen in self._masks)

    def reused(self, branch: Hashable, make: Callable[[], KeptT]) -> KeptT:
        """What a branch keeps of its blocks' results for the steps that skip them."""
        return cast("KeptT", self._reused.get(branch, make))

    def forget(self) -> None:
        """Drop all that is kept."""
        self._kept.clear()
        self._reused.clear()
        self._masks.clear()

    def _number(self, mask: torch.Tensor, forward_id: int) -> int:
        # A held mask's memory does not become another's, and nobody changes it within a forward.
        place = (forward_id, *_place(mask))
        captured = is_captured(mask.device)
        for seen in self._masks:
            if seen.place == place or (captured and seen.place[1:] == place[1:]):
                return seen.number
        if captured:
            raise RuntimeError(
                "While a CUDA graph is captured, a key mask must be the tensor that an earlier call had: its content "
                "cannot be looked at."
            )
        for seen in self._masks:
            same_kind = seen.content.shape == mask.shape and seen.content.device == mask.device
            if same_kind and torch.equal(seen.content, mask):
                seen.held, seen.place = mask, place
                return seen.number
        # A copy: the caller may change its tensor before the next forward.
        seen = _SeenMask(next(self._numbers), mask.clone(), mask, place)
        self._masks = [*self._masks[1 - KEPT_PLACES :], seen]
        return seen.number


def _place(mask: torch.Tensor) -> tuple[Hashable, ...]:
    return mask.data_ptr(), mask.shape, mask.stride()
