"""Processes that ``accelerate launch`` or ``torchrun`` started, which share a file of prompts out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ..process_group import load_group_defaults

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

ItemT = TypeVar("ItemT")


def accelerate_state(target: torch.device) -> PartialState:
    """Accelerate's view of the processes, joined where a launcher started several; on a CPU they speak by gloo."""
    load_group_defaults()
    from accelerate import PartialState

    return PartialState(cpu=target.type == "cpu")


@dataclass(frozen=True)
class Processes:
    """This process among those started together.

    Attributes:
        number: of all.
        rank: of this one; the first speaks for all.
        local: its place on its machine, by which it takes a GPU.
    """

    number: int = 1
    rank: int = 0
    local: int = 0

    @classmethod
    def launched(cls, target: torch.device) -> Processes:
        """Those that a launcher announced in the environment; all of them must call it.

        Args:
            target: what was asked for: on a CPU they speak by gloo.
        """
        number = int(os.environ.get("WORLD_SIZE", "1"))
        if number < 2:
            return cls()
        state = accelerate_state(target)
        return cls(state.num_processes, state.process_index, state.local_process_index)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def device(self, target: torch.device) -> torch.device:
        """This process' own device of that kind."""
        import torch

        if self.number < 2 or target.type == "cpu" or target.index is not None:
            return target
        return torch.device(target.type, self.local)

    def from_first(self, made: ItemT | None) -> ItemT:
        """What the first process made; the others give None. All must call it."""
        held: list[Any] = [made]
        if self.number > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(held)
        found: ItemT = held[0]
        return found

    def share(self, items: Sequence[ItemT]) -> list[ItemT]:
        """This process' items, in turns."""
        return list(items[self.rank :: self.number])

    def all_of(self, own: list[ItemT]) -> list[ItemT]:
        """The items of all processes, one process' after another's. All must call it."""
        if self.number < 2:
            return own
        from accelerate.utils import gather_object

        gathered: list[ItemT] = gather_object(own)
        return gathered

    def end(self) -> None:
        """Part from the others, once all have come so far."""
        if self.number > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()
            PartialState().destroy_process_group()
