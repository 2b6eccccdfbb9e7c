"""Linear layers of attention outputs, one for all heads or one a head; a bias whose gradient is as fast as memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Sums that run side by side: enough for every multiprocessor, and few to add up.
_SUMS = 1024


def sum_rows(x: torch.Tensor) -> torch.Tensor:
    """Sum of ``[N, D]`` over its rows, in float32 (float64 for float64).

    In two steps: of so many rows torch makes one sum a channel, and a GPU has far more multiprocessors than 128
    channels can keep busy (0.20 ms in place of 0.04 for 393,216 rows on an H100).
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    whole = len(x) // _SUMS * _SUMS
    rest = x[whole:].sum(0, dtype=dtype)
    if whole == 0:
        return rest
    return x[:whole].unflatten(0, (_SUMS, -1)).sum(1, dtype=dtype).sum(0) + rest


class _Projection(torch.autograd.Function):
    """``F.linear`` with :func:`sum_rows` as the gradient of the bias."""

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        dx = grad @ weight if ctx.needs_input_grad[0] else None
        dweight = rows.T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        dbias = sum_rows(rows).to(grad.dtype) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias


def project(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``x @ weight.T + bias``, as ``F.linear``, differentiable once.

    Args:
        x: ``[..., D]``.
        weight, bias: ``[E, D]`` and ``[E]`` in x's dtype.

    Returns:
        ``[..., E]``.
    """
    if torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)  # in the dtype that autocast chooses, backward included
    return _Projection.apply(x, weight, bias)


def project_heads(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``[B, S, H, D]`` through ``weight`` ``[D, D]`` or ``[H, D, D]`` (out, in) plus ``bias``, in x's dtype."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if weight.dim() == 2 and (bias is None or bias.dim() == 1):
        return F.linear(x, weight, bias)
    x = torch.einsum("bshd,ed->bshe" if weight.dim() == 2 else "bshd,hed->bshe", x, weight)
    return x if bias is None else x + bias
