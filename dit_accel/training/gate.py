"""Learned selections trained to tell the exact attention mass, on the dense model's own trajectory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ..call import AttentionCall
from ..kernels.selection.block_mass import block_mass
from ..layout import TokenLayout
from ..patches.handle import PatchHandle
from ..plan import SequenceBlocks
from ..stages.select.learned import Learned, gate_divergence


@contextmanager
def gate_losses(handle: PatchHandle) -> Iterator[dict[int, list[torch.Tensor]]]:
    """Divergences of every sparse call of the forwards in the context, by layer.

    The forwards go on with the model's own attention, so that every layer's queries and keys are the dense model's.

    Raises:
        ValueError: the patch's selection learns nothing.
    """
    select = handle.recipe.select
    if not isinstance(select, Learned):
        raise ValueError(f"The objective gate is for a learned selection, got {type(select).__name__}.")
    found: dict[int, list[torch.Tensor]] = {}

    def see(_transformer: str, call: AttentionCall) -> None:
        if call.plan is not None and not call.repeated:
            found.setdefault(call.layer, []).append(divergence(call, select))

    with handle.observe(see), handle.tap_outputs(_dense_stream):
        yield found


def divergence(call: AttentionCall, select: Learned) -> torch.Tensor:
    """Of one sparse call, a 0-d tensor with a gradient for its gate."""
    blocks = blocks_of(call, select)
    assert call.plan is not None
    call = call.with_keys(call.plan.keys)
    with torch.no_grad():
        tables = select.prepare(blocks)
        mass = exact_mass(call, blocks)
    return gate_divergence(blocks, tables, select, call, mass)


def exact_mass(call: AttentionCall, blocks: SequenceBlocks) -> torch.Tensor:
    """Exact attention mass of each block pair of a call, float32 ``[B, H, nq, nk]``."""
    return block_mass(
        call.q.detach(),
        call.k.detach(),
        block_q=blocks.block_q,
        block_k=blocks.block_k,
        rows=blocks.kernel_rows,
        key_mask=call.key_mask,
        scale=call.scale,
    )[0]


def blocks_of(call: AttentionCall, select: Learned) -> SequenceBlocks:
    """The blocks of a sparse call's plan."""
    assert call.plan is not None
    assert isinstance(call.layout, TokenLayout)
    rows = call.plan.rows
    if rows is not None:
        # As an order gives them: without the leading ones of kernels.
        while rows.dim() > 1 and rows.shape[0] == 1:
            rows = rows[0]
    return SequenceBlocks(call.layout, rows, *select.block, call.q.device)


def _dense_stream(_layer: int, output: torch.Tensor, dense: Callable[[], torch.Tensor] | None) -> torch.Tensor:
    return output if dense is None else dense()
