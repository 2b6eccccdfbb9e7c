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
    """

    def __init__(self) -> None:
        self.index = 0
        self.forced = self.skips = False
        self.entered: Streams = ()
        self.added: list[tuple[int, Streams]] = []

    def begin(self, index: int | None) -> None:
        self.index = index or 0
        self.forced = self.skips = False

    def expected(self, order: int) -> Streams:
        """What the blocks would add at this step."""
        step, latest = self.added[-1]
        if order == 0 or len(self.added) < 2:
            return latest
        before, earlier = self.added[-2]
        share = (self.index - step) / (step - before)
        return tuple(
            None if now is None or then is None else now + (now - then) * share
            for now, then in zip(latest, earlier, strict=True)
        )


class _AddedHook(ModelHook):
    """Around one block."""

    def __init__(
        self, states: StateManager, computes: Callable[[], bool], order: int, is_first: bool, is_last: bool
    ) -> None:
        super().__init__()
        self.states = states
        self.computes = computes
        self.order = order
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
            state.skips = bool(state.added) and not state.forced and not self.computes()
            if state.skips:
                expected = state.expected(self.order)
                return self._returned(tuple(map(_sum, streams, expected)))
            state.entered = streams
        elif state.skips:
            return self._returned(streams)
        run: Callable[..., Any] = self.fn_ref.original_forward  # type: ignore[assignment]
        output = run(*args, **kwargs)
        if self.is_last:
            added = tuple(map(_difference, self._streams(output), state.entered))
            state.added = [*state.added, (state.index, added)][-1 - self.order :]
            state.entered = ()
        return output

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


def apply_added(stand_in: nn.Module, blocks: Sequence[str], computes: Callable[[], bool], order: int) -> None:
    """Put the hooks on the blocks of a transformer.

    Args:
        blocks: their paths, in the order of execution.
        computes: whether the forward under way runs them, asked once a forward.
        order: of the continuation: 0 or 1.
    """
    states = StateManager(AddedState)  # type: ignore[arg-type]
    for path in blocks:
        hook = _AddedHook(states, computes, order, path == blocks[0], path == blocks[-1])
        registry = HookRegistry.check_if_exists_or_initialize(stand_in.get_submodule(path))
        registry.register_hook(hook, "dit_accel_added")
