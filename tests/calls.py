"""Attention calls, for stages and for engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dit_accel.call import AttentionCall, AttentionInputs
from dit_accel.engine import Engine
from dit_accel.layout import StepContext, TokenLayout
from dit_accel.run import Run
from dit_accel.stages.select.protocol import Select


def call_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> AttentionCall:
    """A call of (B, S, H, D) tensors with the default scale, for which every operation chooses its backend."""
    inputs = AttentionInputs(q, k, k if v is None else v, key_mask, scale)
    return AttentionCall.of(0, inputs, "no layout", StepContext(), Run())


def gated(call: AttentionCall, select: Select) -> AttentionCall:
    """The call with an untrained gate where a selection is learned."""
    if select.is_learned:
        call.router = select.build(call.q.shape[2], call.q.shape[3])
    return call


def give_gates(engine: Engine, heads: int, head_dim: int) -> None:
    """Untrained gates for every layer of an engine whose selection is learned."""
    if engine.recipe.select.is_learned:
        for layer in range(len(engine.records)):
            engine.routers[layer] = engine.recipe.select.build(heads, head_dim)


def attend(
    engine: Engine,
    layer: int,
    inputs: AttentionInputs,
    layout: TokenLayout | str,
    step: StepContext,
    dense: Callable[[], torch.Tensor],
    learned: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """A call of an engine that has no session."""
    return engine.attend(AttentionCall.of(layer, inputs, layout, step, engine.run), dense, learned)
