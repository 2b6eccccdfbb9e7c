"""Attention of queries that stay to keys that go round a ring of processes, and the masks of each process' keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .call import AttentionCall
from .kernels import BlockMask
from .kernels.attention.merge import merge_attention
from .kernels.common.tokens import hidden_blocks
from .kernels.mask.cuts import MaskCuts
from .plan import AttentionPlan
from .ring import RingPart, RingShard

# Output (B, S, H, D) and log-sum-exp [B, H, S] of a call whose keys are some of the sequence's.
Attend = Callable[[AttentionCall, AttentionPlan], tuple[torch.Tensor, torch.Tensor]]


def masks_around(call: AttentionCall, plan: AttentionPlan) -> Callable[[int], BlockMask]:
    """A plan's blocks of this process' queries and of each process' keys around a ring; cut once a plan."""
    part = call.part
    assert part is not None
    spans = [part.k_span(rank) for rank in range(part.ring.size)]
    cuts = None if plan.shares is None else plan.shares.blocks
    return _cut(call, cuts, lambda: plan.mask, part.q_span(), spans)


def mask_of_own_keys(call: AttentionCall, cuts: MaskCuts | None, mask: Callable[[], BlockMask]) -> BlockMask:
    """All query blocks of a sequence and the key blocks of this process around a ring.

    Args:
        cuts: of the mask, where its plan is kept.
        mask: gives it.
    """
    part = call.part
    assert part is not None
    return _cut(call, cuts, mask, slice(0, part.q_blocks[-1]), [part.k_span(part.ring.rank)])(0)


def _cut(
    call: AttentionCall, cuts: MaskCuts | None, mask: Callable[[], BlockMask], queries: slice, keys: list[slice]
) -> Callable[[int], BlockMask]:
    hides, backend = call.key_mask is not None, call.backend("selection")
    # What a CUDA graph makes while it is captured is its own.
    cuts, keep = (MaskCuts(), False) if cuts is None else (cuts, not call.captured)
    return cuts.parts(mask, queries, keys, key_mask=hides, keep=keep, backend=backend)


def shares_of_work(call: AttentionCall, plan: AttentionPlan) -> torch.Tensor:
    """Kept share of the blocks of each process' queries around a ring, float ``[n]``; worked out once a plan."""
    part = call.part
    assert part is not None
    place = tuple(part.q_counts)
    known = {} if plan.shares is None else plan.shares.work
    if place in known:
        return known[place]
    with torch.inference_mode(False):
        counts = plan.mask.kv_num_blocks.float().mean((0, 1)) / plan.mask.num_blocks[1]
        found = torch.stack([blocks.mean() for blocks in counts.split(part.q_counts)])
    if not call.captured:
        known[place] = found
    return found


def full_masks_around(call: AttentionCall) -> list[BlockMask]:
    """All blocks of this process' queries and of each process' keys around a ring."""
    part, block = call.part, 128
    assert part is not None
    masks = []
    for rank in range(part.ring.size):
        sizes = (block, block, call.q.shape[1], part.key_slots(rank))
        keep = torch.ones(1, 1, *(-(-size // block) for size in sizes[2:]), dtype=torch.bool, device=call.q.device)
        partial = None
        visible = part.key_mask_of(rank, call.key_mask)
        if visible is not None:
            empty, partial = hidden_blocks(visible, block)
            keep, partial = keep & ~empty[..., None, :], partial[..., None, :]
        masks.append(BlockMask.from_dense(keep, *sizes, partial=partial, backend=call.backend("selection")))
    return masks


def attend_around(
    call: AttentionCall, mask_of: Callable[[int], BlockMask], attend: Attend
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of this process' slots to the kept blocks of all keys, and its log-sum-exp.

    The keys of the process before are on their way while those at hand are attended. Gradients let keys and values go
    round again, and their gradients with them, so that no process ever holds all of them.

    Args:
        call: its tensors are of this process' slots; ``call.part`` says which those are.
        mask_of: these queries' blocks of a process' keys; asked for when those are at hand, behind the first send.
        attend: one call of the kernels.
    """
    part = call.part
    assert part is not None
    key_mask = call.key_mask

    def attend_to(rank: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        here = replace(call, q=q, k=k, v=v, key_mask=part.key_mask_of(rank, key_mask), part=None)
        return attend(here, AttentionPlan(None, mask_of(rank)))

    out, lse = _Around.apply(call.q, call.k, call.v, part, attend_to, call.backend("selection"))
    return out, lse


class _Around(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, part: RingPart, attend_to: Any, backend: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total: tuple[torch.Tensor, torch.Tensor] | None = None
        left = part.ring.size
        for rank, keys in part.around(k, v):
            left -= 1
            found = attend_to(rank, q, *keys)
            if total is None:
                total = found
            else:
                # Parts are as the kernels wrote them; what is merged once more must not be rounded meanwhile.
                out, part_lse = found
                total = merge_attention(*total, out, part_lse, q.dtype if left == 0 else None, backend)
        assert total is not None
        out, lse = total
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.part, ctx.attend_to = part, attend_to
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _grad_lse: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        part: RingPart = ctx.part
        ring: RingShard = part.ring
        wide = lse.dtype
        d_q = torch.zeros(q.shape, dtype=wide, device=q.device)
        # Gradients of keys and values travel with them, one step behind, and a last step brings them home.
        behind = None
        for rank, keys in part.around(k, v):
            found = _gradients(q, keys, out, lse, grad, lambda *given, rank=rank: ctx.attend_to(rank, *given))
            d_q += found[0]
            d_keys = [x.to(wide) for x in found[1:]]
            if behind is not None:
                d_keys = [x.add_(came) for x, came in zip(d_keys, behind.arrived(), strict=True)]
            behind = ring.send(d_keys, part.key_slots((rank - 1) % ring.size))
        assert behind is not None
        d_k, d_v = behind.arrived()
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None, None, None


def _gradients(
    q: torch.Tensor,
    keys: Sequence[torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    grad: torch.Tensor,
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, ...]:
    """Gradients of queries, keys and values of one part of the merged output.

    The output is the mean of the parts' outputs o_p with weights w_p = exp(lse_p - lse), so that dL/do_p is w_p dO, and
    dL/dlse_p is w_p dO . (o_p - out).
    """
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, *keys)]
        part, part_lse = attend(*leaves)
        with torch.no_grad():
            weight = (part_lse - lse.masked_fill(lse == -torch.inf, 0.0)).exp()
            d_out = (weight.transpose(1, 2)[..., None] * grad).to(part.dtype)
            difference = part.to(lse.dtype) - out.to(lse.dtype)
            d_lse = weight * (grad.to(lse.dtype) * difference).sum(-1).transpose(1, 2)
        return torch.autograd.grad((part, part_lse), leaves, (d_out, d_lse))
