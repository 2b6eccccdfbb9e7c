"""Blocks left out still count by their means: one softmax over the kept keys and the others' means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from ...call import AttentionCall
from ...kernels.attention.means import BlockMeans, LeftOutMeans
from ...kernels.coarse.api import block_means
from ...kernels.common.choice import Case, Choice, Operation
from ...kernels.common.tokens import gather_mask
from ...kernels.mask.packed import kept_bits
from ...kernels.pyramid.means import choose_means
from ...kernels.selection.api import pool_two
from ...plan import AttentionPlan
from ..select.means import own_key_mask
from ..select.protocol import Select
from .protocol import Attended, Compensation, Sparse


@dataclass(frozen=True)
class PooledResidual(Compensation):
    """Every query attends mean keys and mean values of the blocks left out, in one softmax with the kept keys.

    A mean of n tokens has the logit ``scale * q . mean(k) + log n``, as the coarsest level of a pyramid of keys
    (PSA) and the centroids of SVG-EAR have. By Jensen's inequality that is at most what its tokens have together,
    so that a block left out never weighs too much. On a GPU a kernel goes on from the output and the log-sum-exp of the
    kept blocks, where it is not the launch of those that attends the means. Costs the products of tokens times
    means. A gradient is torch's. In a call where queries may see different keys a mean is of keys that some must not
    see, and nothing stands in for what is left out.

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
    allows_pairs: ClassVar[bool] = True
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
        return {"residual": choose_means(case, backend)}

    def attend(self, call: AttentionCall, plan: AttentionPlan, sparse: Sparse) -> Attended:
        """Sparse attention, and the means in its softmax."""
        if call.pairs is not None:
            return sparse()
        kept = kept_bits(plan.kept, call.backend("selection"))
        if call.part is not None:
            kept = kept[:, :, call.part.q_span()]
        return sparse(LeftOutMeans(self._means(call, plan), kept, call.backend("residual")))

    def _means(self, call: AttentionCall, plan: AttentionPlan) -> BlockMeans:
        """Of all keys, also where processes around a ring have some of them."""
        mask, part, backend = plan.mask, call.part, call.backend("selection")
        size = self.tokens or mask.block_k
        rows, own = plan.rows if part is None else None, own_key_mask(call)
        if torch.is_grad_enabled() and (call.k.requires_grad or call.v.requires_grad):
            if part is not None:
                raise RuntimeError("PooledResidual has no gradient around a ring; train without it, or under Ulysses.")
            keys, values = (block_means(x, size, rows=rows, key_mask=own, backend=backend) for x in (call.k, call.v))
        else:
            # Of the dtype that is multiplied in: the kernel's is the call's.
            in_kernel = call.backend("residual") == "triton"
            dtype = call.q.dtype if in_kernel else torch.promote_types(call.q.dtype, torch.float32)
            both = pool_two(call.k, call.v, size, rows=rows, key_mask=own, dtype=dtype, backend=backend)
            if part is not None:
                numbers = [-(-part.key_slots(rank) // size) for rank in range(part.ring.size)]
                both = part.ring.gather(both, 3, numbers)
            keys, values = both
        visible = None
        if call.key_mask is not None:
            visible = F.pad(gather_mask(call.key_mask, plan.rows), (0, -mask.kv_len % size))
            visible = visible.unflatten(2, (-1, size)).sum(3, dtype=torch.float32)
        return BlockMeans(keys, values, size, mask.block_k, mask.kv_len, visible)

    def density(self, plan: AttentionPlan) -> torch.Tensor:
        """Kept share of all block pairs, and the means of the others counted as one key each."""
        return self.work(plan.density, plan)

    def work(self, kept: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """The same of some rows."""
        return kept + (1.0 - kept) / (self.tokens or plan.mask.block_k)
