"""Rotary position embedding (RoFormer, arXiv 2104.09864) of queries and keys, in one pass over both."""

from __future__ import annotations

import torch


def rotate_pairs(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys with columns 2i and 2i + 1 of each head turned by the angle of pair i.

    On a GPU one Triton kernel reads and writes each value once, computes in float32 and rounds once. What
    torch.compile makes of diffusers' indexed assignments takes two to ten times as long (docs/performance.md).
    float64, and tensors elsewhere, are computed by torch in the wider of both dtypes, and rounded once too.

    Args:
        q, k: ``[B, S, H, D]`` with an even D, any strides; heads may differ in number.
        cos, sin: ``[B|1, S, 1, D]``, of which cos is read in columns 2i and sin in columns 2i + 1.

    Returns:
        Both, contiguous, in their own dtypes.
    """
    if q.is_cuda and torch.float64 not in (q.dtype, k.dtype):
        from .triton import rotate_pairs_triton

        return rotate_pairs_triton(q, k, cos, sin)
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((first * c - second * s, first * s + second * c), -1).flatten(-2).to(x.dtype)
