"""Memory at fixed addresses, which graphs read and write."""

from __future__ import annotations

import weakref

import torch


def _uses(storage: torch.UntypedStorage) -> int:
    """How many tensors share a memory. Only torch's own count sees views of views, which hold no Python object."""
    return int(torch._C._storage_Use_Count(storage._cdata))


class Slot:
    """Memory for one tensor, at an address that stays."""

    def __init__(self, like: torch.Tensor, device: torch.device) -> None:
        # Dimensions that were expanded are written once.
        self._narrow = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in like.stride())
        given = like[self._narrow]
        self._filled = torch.empty_strided(given.shape, given.stride(), dtype=like.dtype, device=device)
        self.tensor = self._filled if 0 not in like.stride() else self._filled.expand(like.shape)
        self._facts = (like.shape, self.tensor.stride(), like.dtype)
        self._storage = self.tensor.untyped_storage()
        self._own_uses = _uses(self._storage)
        self._source: weakref.ref[torch.Tensor] | None = None
        self._version = 0

    @property
    def is_free(self) -> bool:
        """Whether nobody holds what is in it, or a view of that."""
        return _uses(self._storage) == self._own_uses

    def fits(self, like: torch.Tensor, device: torch.device) -> bool:
        """Whether it is for such a tensor."""
        return self._facts == (like.shape, like.stride(), like.dtype) and self.tensor.device == device

    def holds(self, given: torch.Tensor) -> bool:
        """Whether a tensor is this memory itself."""
        own = self.tensor
        return given.data_ptr() == own.data_ptr() and (given.shape, given.stride(), given.dtype) == self._facts

    def fill(self, given: torch.Tensor) -> None:
        """Make it hold what a tensor holds, which is copied unless the latest call had the very same."""
        source = None if self._source is None else self._source()
        if source is given and self._version == given._version:
            return
        self._filled.copy_(given[self._narrow])
        self._source, self._version = weakref.ref(given), given._version

    def write(self, result: torch.Tensor) -> None:
        """Copy a result into it, as a part of what is captured."""
        self._filled.copy_(result[self._narrow])

    def shown(self) -> torch.Tensor:
        """What it holds, for a caller: it counts as held while that, or a view of it, is alive."""
        return self.tensor.detach()


class Slots:
    """The memory of one run in one thread.

    Results of blocks take turns in few places: a place is free once the model has dropped what was in it. What blocks
    are given from elsewhere has places of its own, one for each tensor of a forward, which live as long as the graphs
    that read them.
    """

    def __init__(self) -> None:
        self._results: list[Slot] = []
        # By the tensor that it was made for: blocks of one forward share what they are given.
        self._made_for: list[tuple[weakref.ref[torch.Tensor], weakref.ref[Slot]]] = []

    def of_given(self, given: torch.Tensor, taken: list[Slot]) -> Slot:
        """Where a graph reads this tensor: a result of an earlier block where it lies, unless that is taken; anything
        else is copied."""
        for slot in self._results:
            if slot.holds(given) and not any(slot is one for one in taken):
                return slot
        self._made_for = [(source, slot) for source, slot in self._made_for if slot() is not None]
        for source, made in self._made_for:
            found = made()
            if source() is given and found is not None:
                return found
        slot = Slot(given, given.device)
        self._made_for.append((weakref.ref(given), weakref.ref(slot)))
        return slot

    def is_result(self, slot: Slot) -> bool:
        """Whether a place takes turns."""
        return any(slot is one for one in self._results)

    def for_result(self, like: torch.Tensor, device: torch.device, taken: list[Slot]) -> Slot:
        """A free place for a result of a form, none of those that are taken."""
        for slot in self._results:
            if slot.fits(like, device) and slot.is_free and not any(slot is one for one in taken):
                return slot
        slot = Slot(like, device)
        self._results.append(slot)
        return slot
