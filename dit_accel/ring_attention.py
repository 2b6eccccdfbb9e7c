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
from .plan import AttentionPlan
from .ring import RingPart, RingShard

# Output (B, S, H, D) and log-sum-exp [B, H, S] of a call whose keys are some of the sequence's.
Attend = Callable[[AttentionCall, AttentionPlan], tuple[torch.Tensor, torch.Tensor]]


def masks_around(call: AttentionCall, plan: AttentionPlan) -> list[BlockMask]:
    """A plan's blocks of this process' queries and of each process' keys around a ring."""
    part = call.part
    assert part is not None
    spans = [part.k_span(rank) for rank in range(part.ring.size)]
    return plan.mask.parts(part.q_span(), spans, call.backend("selection"))


def mask_of_own_keys(call: AttentionCall, mask: BlockMask) -> BlockMask:
    """All query blocks of a sequence and the key blocks of this process around a ring."""
    part = call.part
    assert part is not None
    own = part.k_span(part.ring.rank)
    return mask.parts(slice(0, mask.num_blocks[0]), [own], call.backend("selection"))[0]


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


def attend_around(call: AttentionCall, masks: Sequence[BlockMask], attend: Attend) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of this process' slots to the kept blocks of all keys, and its log-sum-exp.

    The keys of the process before are on their way while those at hand are attended. Gradients let keys and values go
    round again, and their gradients with them, so that no process ever holds all of them.

    Args:
        call: its tensors are of this process' slots; ``call.part`` says which those are.
        masks: of these queries, and of each process' keys.
        attend: one call of the kernels.
    """
    part = call.part
    assert part is not None
    masks_of_keys = [part.key_mask_of(rank, call.key_mask) for rank in range(part.ring.size)]

    def attend_to(rank: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        here = replace(call, q=q, k=k, v=v, key_mask=masks_of_keys[rank], part=None)
        return attend(here, AttentionPlan(None, masks[rank]))

    out, lse = _Around.apply(call.q, call.k, call.v, part, attend_to, call.backend("selection"))
    return out, lse


class _Around(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, part: RingPart, attend_to: Any, backend: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total: torch.Tensor | None = None
        lse: torch.Tensor | None = None
        for rank, keys in part.around(torch.stack([k, v]), dim=2):
            out, part_lse = attend_to(rank, q, *keys)
            if total is None or lse is None:
                total, lse = out.to(part_lse.dtype, copy=True).contiguous(), part_lse.clone().contiguous()
            else:
                merge_attention(total, lse, out, part_lse, backend)
        assert total is not None
        assert lse is not None
        out = total.to(q.dtype)
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
        d_kv: torch.Tensor | None = None
        behind = None
        for rank, keys in part.around(torch.stack([k, v]), dim=2):
            found = _gradients(q, keys, out, lse, grad, lambda *given, rank=rank: ctx.attend_to(rank, *given))
            d_q += found[0]
            d_kv = torch.stack(found[1:]).to(wide)
            if behind is not None:
                d_kv += behind.arrived()
            behind = ring.send(d_kv, part.key_slots((rank - 1) % ring.size), dim=2)
        assert behind is not None
        d_k, d_v = behind.arrived()
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None, None, None


def _gradients(
    q: torch.Tensor,
    keys: torch.Tensor,
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
