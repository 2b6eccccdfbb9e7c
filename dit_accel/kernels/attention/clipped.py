"""Clipped softmax over the kept blocks: Quantizable Transformers (arXiv 2306.12929)."""

from __future__ import annotations

import torch

from ..common.choice import Case, Choice, choose
from ..common.scale import scale_of
from ..mask.block_mask import BlockMask
from .api import validate
from .gather import Clip, gather_attention


def clipping_change(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    alpha: torch.Tensor,
    *,
    zeta: float = 1.0,
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """What clipping its weights adds to the output of :func:`~dit_accel.kernels.block_sparse_attention`.

    ``(clip((zeta - gamma) P + gamma, 0, 1) - P) V`` with ``gamma = -alpha / n``, of the weights ``P`` of a softmax over
    the ``n`` keys that a query sees (the paper: all keys of a sequence). Differentiable, in torch on any device: no
    kernel can take a weight off a sum before it knows the sum of all weights.

    Args:
        alpha: ``[H]``, at least 0.
        zeta: at least 1.

    Other arguments and errors are those of ``block_sparse_attention``.

    Returns:
        ``[B, Sq, H, D]`` in ``q.dtype``; 0 for queries that see no key.
    """
    validate(q, k, v, mask, rows, key_mask)
    if alpha.shape != (q.shape[2],):
        raise ValueError(f"alpha must be one number for each of {q.shape[2]} heads, got {tuple(alpha.shape)}.")
    scale = float(scale_of(q, scale))
    clip = Clip(alpha, zeta)
    options = {"rows": rows, "key_mask": key_mask}
    return gather_attention(q, k, v, mask, **options, scale=scale, return_lse=True, clip=clip)[0]


def choose_clipped(case: Case, backend: str) -> Choice:
    """The backend of :func:`clipping_change`; raises a ValueError if it is refused."""
    return choose("clipped_softmax", backend, case, "there is no Triton kernel for it")
