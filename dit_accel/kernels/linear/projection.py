"""Linear layers of attention outputs, one for all heads or one a head, and the sum that a bias's gradient is."""

from __future__ import annotations

import torch
import torch.nn.functional as F

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


def project_heads(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``[B, S, H, D]`` through ``weight`` ``[D, D]`` or ``[H, D, D]`` (out, in) plus ``bias``, in x's dtype."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if weight.dim() == 2 and (bias is None or bias.dim() == 1):
        return F.linear(x, weight, bias)
    x = torch.einsum("bshd,ed->bshe" if weight.dim() == 2 else "bshd,hed->bshe", x, weight)
    return x if bias is None else x + bias
