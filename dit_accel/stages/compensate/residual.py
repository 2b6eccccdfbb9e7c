"""Blocks left out still count by their means: one softmax over the kept keys and the others' means."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from ...call import AttentionCall
from ...kernels.common.choice import Case, Choice, Operation, choose
from ...kernels.common.tokens import gather_mask, gather_rows
from ...kernels.selection.api import pool_blocks
from ...plan import AttentionPlan
from ..select.means import own_key_mask
from ..select.protocol import Select
from .protocol import Attended, Compensation

LOGITS_AT_ONCE = 1 << 27


@dataclass(frozen=True)
class PooledResidual(Compensation):
    """Every query attends mean keys and mean values of the blocks left out, in one softmax with the kept keys.

    A mean of n tokens has the logit ``scale * q . mean(k) + log n``, as the coarsest level of a pyramid of keys
    (PSA) and the centroids of SVG-EAR have. By Jensen's inequality that is at most what its tokens have together,
    so that a block left out never weighs too much. Two partial softmaxes are merged by their log-sum-exps.
    Costs the products of tokens times means. Inference only.

    Attributes:
        tokens: neighbours in a block that share a mean, a divisor of a key block; 0: one mean for all of them. Windows,
            which leave out much, gain from 16 (docs/laboratory.md).
    """

    tokens: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise ValueError(f"compensate.tokens must be at least 0 tokens, got {self.tokens}.")

    is_static: ClassVar[bool] = True
    needs_lse: ClassVar[bool] = True
    goes_round: ClassVar[bool] = True

    def conflicts_with(self, select: Select) -> str | None:
        if select.is_dense:
            return "PooledResidual stands in for the blocks left out, and a dense selection leaves none out."
        if select.hides_tokens:
            return (
                f"PooledResidual stands in for whole blocks, and {type(select).__name__} also hides single tokens of "
                "blocks that it keeps. Some selections can be told to read their blocks whole: select.whole=True."
            )
        if self.tokens and select.block[1] % self.tokens:
            return (
                f"compensate.tokens must divide a key block of {select.block[1]} tokens, got {self.tokens}: a mean is "
                "of one block."
            )
        return super().conflicts_with(select)

    def choices(self, case: Case, backend: str) -> dict[Operation, Choice]:
        """The attention over means."""
        return {"residual": choose("residual", backend, case, "there is no Triton kernel for it")}

    def attend(self, call: AttentionCall, plan: AttentionPlan, sparse: Callable[[], Attended]) -> Attended:
        """Sparse attention and the means, merged."""
        q, k, v, key_mask = call.q, call.k, call.v, call.key_mask
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise RuntimeError("PooledResidual has no gradient; train with another compensation or without one.")
        out, lse = sparse()
        mask = plan.mask
        size = self.tokens or mask.block_k
        call.backend("residual")  # torch whatever its name: there is nothing to hand it to
        batch, length, heads, _ = q.shape
        rows, part = (plan.rows, None) if call.part is None else (None, call.part)
        slots = None if rows is None else rows.long().expand(batch, heads, length)
        queries = gather_rows(q, rows)
        backend = call.backend("selection")
        own = own_key_mask(call)
        mean_k, mean_v = (pool_blocks(x, size, rows=rows, key_mask=own, backend=backend) for x in (k, v))
        if part is not None:
            numbers = [-(-part.key_slots(rank) // size) for rank in range(part.ring.size)]
            mean_k, mean_v = part.ring.gather(torch.stack([mean_k, mean_v]), 3, numbers)
        if key_mask is None:
            key_mask = torch.ones(1, mask.kv_len, dtype=torch.bool, device=q.device)
        visible = F.pad(gather_mask(key_mask, plan.rows), (0, -mask.kv_len % size))
        # A mean without visible keys has no weight: log 0.
        bias = visible.unflatten(2, (-1, size)).sum(3, dtype=torch.float32).log()
        kept = mask.to_dense() if part is None else mask.to_dense()[:, :, part.q_span()]
        kept = kept.repeat_interleave(mask.block_k // size, 3)[..., : mean_k.shape[2]]
        rest, rest_lse = torch.empty_like(out), torch.empty_like(lse)
        group = max(1, LOGITS_AT_ONCE // (batch * heads * mask.block_q * mean_k.shape[2]))
        for first in range(0, kept.shape[2], group):
            run = slice(first * mask.block_q, min((first + group) * mask.block_q, length))
            asked = queries[:, :, run].float()
            hidden = kept[:, :, first : first + group].repeat_interleave(mask.block_q, 2)[:, :, : asked.shape[2]]
            logits = asked @ mean_k.transpose(-1, -2) * call.scale + bias[:, :, None]
            logits = logits.masked_fill(hidden, -math.inf)
            total = logits.logsumexp(-1)
            weights = torch.exp(logits - total.masked_fill(total == -math.inf, 0.0)[..., None])
            found = (weights @ mean_v).to(out.dtype)
            if slots is None:
                rest[:, run] = found.transpose(1, 2)
                rest_lse[:, :, run] = total
            else:
                places = slots[:, :, run]
                rest_lse.scatter_(2, places, total.to(lse.dtype))
                wide = places.transpose(1, 2)[..., None].expand(-1, -1, -1, out.shape[-1])
                rest.scatter_(1, wide, found.transpose(1, 2))
        both = torch.logaddexp(lse, rest_lse)
        # Nothing left out: also where a row sees no key at all.
        share = torch.where(rest_lse == -math.inf, 0.0, torch.exp(rest_lse - both))
        share = share.transpose(1, 2)[..., None].float()
        return torch.lerp(out.float(), rest.float(), share).to(out.dtype), both

    def density(self, plan: AttentionPlan) -> torch.Tensor:
        """Kept share of all block pairs, and the means of the others counted as one key each."""
        return self.work(plan.density, plan)

    def work(self, kept: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """The same of some rows."""
        return kept + (1.0 - kept) / (self.tokens or plan.mask.block_k)
