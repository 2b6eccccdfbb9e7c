"""Heads that a learned router chooses for each block of queries: Mixture-of-Head attention (arXiv 2410.11842), SHRP."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ...call import AttentionCall
from ...heads import HeadShard
from ...plan import AttentionPlan
from ..select.protocol import Select
from .learned import LearnedGate, gate_of_latents, latents_here
from .protocol import Attended, Compensation, Sparse


@dataclass(frozen=True)
class RoutedHeads(Compensation):
    """Every block of queries runs some of the heads, which a learned router chooses; the others read no block there and
    write nothing.

    A head's share of a token is ``softmax(W x + b + log |q|)`` over heads, of the attention layer's input ``x`` and the
    head's query ``q``; heads with the largest mean shares of a block run. ``W`` and ``b`` are zero at the start, when
    the norms of the queries choose, as the paper has it for a model that was trained without a router. A head that runs
    is weighed by one, with the gradient of its share straight through. Blocks with other tokens than latents run all
    heads.

    Deviations: a block of queries chooses, where the paper's tokens do so each for itself, so that the kernels skip
    what is not chosen; no heads that are always on, and no loss that balances heads.

    Attributes:
        kept: share of the heads that run, rounded up to whole heads.
    """

    kept: float = 0.75

    def __post_init__(self) -> None:
        if not 0.0 < self.kept <= 1.0:
            raise ValueError(f"compensate.kept must lie in (0, 1], got {self.kept}.")

    is_static: ClassVar[bool] = True
    is_learned: ClassVar[bool] = True
    reads_input: ClassVar[bool] = True
    spans_references: ClassVar[bool] = False
    goes_round: ClassVar[bool] = True

    def conflicts_with(self, select: Select) -> str | None:
        """A dense selection runs the model's own attention."""
        if select.is_dense:
            return (
                "RoutedHeads acts on this package's attention, and a dense selection runs the model's own; "
                "use select 'full' to route heads that read every block."
            )
        return super().conflicts_with(select)

    def narrow(self, call: AttentionCall, plan: AttentionPlan) -> AttentionPlan:
        """The plan without the blocks of heads that a block of queries does not run.

        Raises:
            ValueError: the order gives each head blocks of other tokens, over which heads cannot be compared.
        """
        if plan.rows is not None and plan.rows.shape[1] > 1:
            raise ValueError(
                "RoutedHeads compares heads over the same tokens, and this order gives each head its own; use an order "
                "that all heads share, such as tiles."
            )
        with torch.no_grad():
            share, first = _shares(call)
            batch, number, heads = share.shape
            length, block = call.q.shape[1], plan.mask.block_q
            # Other tokens than latents: a share that is above all others, in every head.
            of_tokens = torch.full((batch, length, heads), math.inf, dtype=share.dtype, device=share.device)
            of_tokens[:, first : first + number] = share
            if call.part is not None:
                of_tokens = of_tokens.masked_fill(~latents_here(call, call.part)[..., 0], math.inf)
            elif plan.rows is not None:
                rows = plan.rows[:, 0].long().expand(batch, length)
                of_tokens = of_tokens.gather(1, rows[..., None].expand_as(of_tokens))
            of_blocks = F.pad(of_tokens, (0, 0, 0, -length % block)).unflatten(1, (-1, block)).sum(2)
            if call.part is not None:
                of_blocks = call.part.ring.gather(of_blocks, 1, call.part.q_counts)
            of_heads = of_blocks if call.heads is None else call.heads.gather(of_blocks.mT).mT
            best = of_heads.topk(math.ceil(self.kept * of_heads.shape[-1]), -1).indices
            runs = torch.zeros_like(of_heads, dtype=torch.bool).scatter_(-1, best, True) | of_heads.isinf()
            runs = runs if call.heads is None else call.heads.own(runs, -1)
            return replace(plan, kept=plan.mask.for_queries(runs.mT), share=None)

    def attend(self, call: AttentionCall, _plan: AttentionPlan, sparse: Sparse) -> Attended:
        """The sparse attention of the heads that run; it is the router's shares that have a gradient."""
        out, witness = sparse()
        if not (torch.is_grad_enabled() and call.gate is not None and call.gate.requires_grad):
            return out, witness
        share, first = _shares(call)
        last = first + share.shape[1]
        # One, with the gradient of a share, of which the mean is one over the number of heads.
        factor = 1.0 + (share - share.detach()) * (share.shape[-1] if call.heads is None else call.heads.total)
        latents = (out[:, first:last] * factor[..., None]).to(out.dtype)
        return torch.cat([out[:, :first], latents, out[:, last:]], 1), witness

    def build_gate(self, heads: int, _head_dim: int, width: int) -> LearnedGate:
        """The router of one layer, zero."""
        return HeadRouter(heads, width)


class HeadRouter(LearnedGate):
    """A linear map of an attention layer's input to a number for each head.

    Parameters ``weight [H, C]`` and ``bias [H]``, zero at the start; it gives ``[B, n, H, 1]`` of ``[B, n, C]``.
    """

    def __init__(self, heads: int, width: int) -> None:
        super().__init__(heads, 1, width)


def _shares(call: AttentionCall) -> tuple[torch.Tensor, int]:
    """Shares of the heads in each latent, float32 (float64 kept) ``[B, n, H]``, and the place of the first latent."""
    gate, first = gate_of_latents(call)
    wide = torch.promote_types(call.q.dtype, torch.float32)
    sizes = call.q[:, first : first + gate.shape[1]].detach().to(wide).norm(dim=-1)
    logits = gate[..., 0].to(wide) + sizes.clamp_min(1e-12).log()
    return logits.softmax(-1) if call.heads is None else _SoftmaxOfHeads.apply(logits, call.heads), first


class _SoftmaxOfHeads(torch.autograd.Function):
    """The softmax of ``[B, n, h]`` over all heads, of which each process has some: sums over heads are gathered."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, heads: HeadShard) -> torch.Tensor:
        total = heads.of_ranks(logits.logsumexp(-1).flatten()).logsumexp(0)
        share = (logits - total.view(*logits.shape[:-1], 1)).exp()
        ctx.save_for_backward(share)
        ctx.heads = heads
        return share

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (share,) = ctx.saved_tensors
        (grad,) = grads
        total = ctx.heads.of_ranks((grad * share).sum(-1).flatten()).sum(0)
        return share * (grad - total.view(*share.shape[:-1], 1)), None
