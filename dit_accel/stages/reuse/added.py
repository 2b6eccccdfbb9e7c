"""Hooks that put what all blocks added in an earlier step in their place, where somebody else decides when.

diffusers' caches decide for themselves, so that this one is ours; its registry says what a block takes and returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from torch import nn

Streams = tuple["torch.Tensor | None", ...]


class AddedState(BaseState):
    """One guidance branch of one run.

    Attributes:
        index: the step under way.
        forced: it runs all blocks, whatever was decided.
        skips: it does not.
        entered: what the first block was given: latents, and the other stream or None.
        added: step, and what the blocks added to each stream, of the latest computed steps.
        leading: the branch that was given the same latents first in this step; None where there is no other, or where
            no branch takes anything from another.
        apart: a leading branch, and what its blocks added to the latents more than this one's, in the latest step that
            both computed.
    """

    def __init__(self) -> None:
        self.index = 0
        self.forced = self.skips = False
        self.entered: Streams = ()
        self.added: list[tuple[int, Streams]] = []
        self.leading: AddedState | None = None
        self.apart: tuple[AddedState, torch.Tensor] | None = None

    def begin(self, index: int | None, leading: AddedState | None = None) -> None:
        self.index = index or 0
        self.forced = self.skips = False
        self.leading = leading

    def keep(self, added: Streams, steps: int) -> None:
        """Remember what the blocks added in this step, or what stands for it, and in so many steps at most."""
        self.added = [*self.added, (self.index, added)][-steps:]

    def part(self) -> None:
        """Remember how far this branch is from the leading one, where both computed this step."""
        led = self._led()
        if self.leading is not None and led is not None:
            self.apart = self.leading, led - self._latents()

    def following(self) -> Streams | None:
        """What the blocks would add at this step by what they added in the leading branch; None where that has not
        computed it, or is not the one from which the difference is known."""
        led = self._led()
        if led is None or self.apart is None or self.apart[0] is not self.leading:
            return None
        # The prompt's stream may be of another length in each branch, and few models read it behind the blocks.
        return led - self.apart[1], *self.added[-1][1][1:]

    def _led(self) -> torch.Tensor | None:
        """What the blocks added to the latents in the leading branch at this step, of this branch's shape."""
        if self.leading is None or not self.leading.added or not self.added:
            return None
        index, (latents, *_) = self.leading.added[-1]
        fits = index == self.index and latents is not None and latents.shape == self._latents().shape
        return latents if fits else None

    def _latents(self) -> torch.Tensor:
        latents = self.added[-1][1][0]
        assert latents is not None
        return latents

    def expected(self, shares: Callable[[Sequence[int]], Sequence[float]]) -> Streams:
        """What the blocks would add at this step, by shares of what the computed steps differ by, latest first."""
        found = self.added[-1][1]
        pairs = zip(
            reversed(self.added), reversed(self.added[:-1]), shares([step for step, _ in self.added]), strict=False
        )
        for (_, latest), (_, earlier), share in pairs:
            found = tuple(
                None if so_far is None or now is None or then is None else so_far + (now - then) * share
                for so_far, now, then in zip(found, latest, earlier, strict=True)
            )
        return found


class _AddedHook(ModelHook):
    """Around one block."""

    def __init__(
        self,
        states: StateManager,
        computes: Callable[[], bool],
        guides: Callable[[], bool],
        kept: int,
        shares: Callable[[Sequence[int]], Sequence[float]],
        is_first: bool,
        is_last: bool,
    ) -> None:
        super().__init__()
        self.states = states
        self.computes = computes
        self.guides = guides
        self.kept = kept
        self.shares = shares
        self.is_first = is_first
        self.is_last = is_last

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self.block = TransformerBlockRegistry.get(type(module))
        # Older versions of diffusers know blocks of the usual names alone.
        self.latents_name = getattr(self.block, "hidden_states_argument_name", "hidden_states")
        self.other_name = getattr(self.block, "encoder_hidden_states_argument_name", "encoder_hidden_states")
        return module

    def new_forward(self, _module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state: AddedState = self.states.get_state()
        streams = self._given(args, kwargs) if self.is_first or state.skips else ()
        if self.is_first:
            expected = self._expected(state)
            state.skips = expected is not None
            if expected is not None:
                return self._returned(tuple(map(_sum, streams, expected)))
            state.entered = streams
        elif state.skips:
            return self._returned(streams)
        run: Callable[..., Any] = self.fn_ref.original_forward  # type: ignore[assignment]
        output = run(*args, **kwargs)
        if self.is_last:
            added = tuple(map(_difference, self._streams(output), state.entered))
            state.keep(added, self.kept)
            state.part()
            state.entered = ()
        return output

    def _expected(self, state: AddedState) -> Streams | None:
        """What stands for the blocks in this forward; None where they run."""
        if state.forced or not state.added:
            return None
        if not self.computes():
            return state.expected(self.shares)
        expected = None if self.guides() else state.following()
        if expected is not None:
            state.keep(expected, self.kept)
        return expected

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams:
        read = self.block._get_parameter_from_args_kwargs
        latents = read(self.latents_name, args, kwargs)
        if self.block.return_encoder_hidden_states_index is None:
            return latents, None
        return latents, read(self.other_name, args, kwargs)

    def _streams(self, output: Any) -> Streams:
        if not isinstance(output, tuple):
            return output, None
        other = self.block.return_encoder_hidden_states_index
        return output[self.block.return_hidden_states_index], None if other is None else output[other]

    def _returned(self, streams: Streams) -> Any:
        """The streams as the block would return them."""
        first, second = self.block.return_hidden_states_index, self.block.return_encoder_hidden_states_index
        if second is None:
            return streams[0]
        returned: list[torch.Tensor | None] = [None] * (max(first, second) + 1)
        returned[first], returned[second] = streams
        return tuple(returned)


def _sum(entered: torch.Tensor | None, added: torch.Tensor | None) -> torch.Tensor | None:
    return entered if entered is None or added is None else entered + added


def _difference(left: torch.Tensor | None, entered: torch.Tensor | None) -> torch.Tensor | None:
    if left is None or entered is None:
        return None
    # Single-stream blocks may be given the prompt and the latents in one, the latents last.
    return left[:, -entered.shape[1] :] - entered


def apply_added(
    stand_in: nn.Module,
    blocks: Sequence[str],
    computes: Callable[[], bool],
    guides: Callable[[], bool],
    kept: int,
    shares: Callable[[Sequence[int]], Sequence[float]],
) -> None:
    """Put the hooks on the blocks of a transformer.

    Args:
        blocks: their paths, in the order of execution.
        computes: whether the step under way runs them, asked once a forward.
        guides: whether all its guidance branches do, asked where it runs them.
        kept: how many computed steps are remembered.
        shares: of their numbers, rising, to what is added to the latest at the step under way: shares of its difference
            to the one before, of that one's to its own, and so on.
    """
    states = StateManager(AddedState)  # type: ignore[arg-type]
    for path in blocks:
        hook = _AddedHook(states, computes, guides, kept, shares, path == blocks[0], path == blocks[-1])
        registry = HookRegistry.check_if_exists_or_initialize(stand_in.get_submodule(path))
        registry.register_hook(hook, "dit_accel_added")
