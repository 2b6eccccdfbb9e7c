"""Gradients of quantised attention: straight through the rounding (arXiv 1308.3432)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..common.quantized_inputs import QuantizedInputs, dequantize
from ..mask.block_mask import BlockMask

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def rounded_inputs(quantized: QuantizedInputs, mask: BlockMask, rows: torch.Tensor | None) -> Inputs:
    """What quantised attention multiplies, float32 q, k, v ``[B, S, H, D]`` in the original order; keys lack their
    mean, which changes no softmax."""
    q, k, v = dequantize(quantized, mask.block_k)
    if quantized.smooth_q:
        q = q + quantized.q_mean.repeat_interleave(mask.block_q, 2)
    q, k, v = q[:, :, : mask.q_len], k[:, :, : mask.kv_len], v[:, :, : mask.kv_len]
    if rows is not None:
        wide = rows.long().expand(q.shape[:3])[..., None].expand_as(q)
        q, k, v = (torch.empty_like(x).scatter_(2, wide, x) for x in (q, k, v))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def straight_through(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    run: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    rounded: Callable[[], Inputs],
    plain: Callable[..., Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of ``run()``, with the gradients that ``plain`` has at the ``rounded`` inputs.

    Between forward and backward the 8-bit numbers are kept; the backward attends again, in the inputs' dtype.
    """
    out, lse = _StraightThrough.apply(q, k, v, run, rounded, plain)
    return out, lse


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        _k: torch.Tensor,
        _v: torch.Tensor,
        run: Callable[[], tuple[torch.Tensor, torch.Tensor]],
        rounded: Callable[[], Inputs],
        plain: Callable[..., Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.rounded, ctx.plain, ctx.dtype = rounded, plain, q.dtype
        out, lse = run()
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_out: torch.Tensor, _of_lse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs = [x.to(ctx.dtype).detach().requires_grad_() for x in ctx.rounded()]
        with torch.enable_grad():
            again = ctx.plain(*inputs)
        return (*torch.autograd.grad(again, inputs, of_out), None, None, None)
