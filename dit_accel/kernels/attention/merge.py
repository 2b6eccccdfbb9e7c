"""Attention to parts of the keys, put together by their log-sum-exps."""

from __future__ import annotations

import torch

from ..common.capability import choose_selection
from ..common.choice import Case


@torch.no_grad()
def merge_attention(
    out: torch.Tensor,
    lse: torch.Tensor,
    part: torch.Tensor,
    part_lse: torch.Tensor,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to two sets of keys, ``[B, S, H, D]``, and its log-sum-exp ``[B, H, S]``; in Triton one launch.

    A softmax over two sets of keys is the mean of the softmaxes over each, weighted by their denominators (blockwise
    attention, arXiv 2310.01889). A row that saw no key has log-sum-exp ``-inf``; so has one whose part saw none.

    Args:
        out: ``[B, S, H, D]``, of any floating-point dtype. It and ``lse`` may be overwritten.
        lse: ``[B, H, S]``, natural logarithm, in float32 or float64, which the mean is computed in.
        part, part_lse: likewise of further keys; they stay.
        dtype: of the result; ``lse.dtype`` if None.
        backend: one of :data:`~dit_accel.kernels.BACKENDS`; ``"auto"`` is Triton on CUDA.
    """
    dtype = lse.dtype if dtype is None else dtype
    if choose_selection(Case(out.device), backend).name == "triton" and lse.dtype == torch.float32:
        from .triton.merge import merge_triton

        return merge_triton(out, lse, part, part_lse, dtype)
    total = torch.logaddexp(lse, part_lse)
    # Where neither saw a key: exp(-inf - -inf) is NaN.
    base = total.masked_fill(total == -torch.inf, 0.0)
    keep, take = ((x - base).exp().transpose(1, 2)[..., None] for x in (lse, part_lse))
    # A NaN of a part whose weight is 0 must not come through.
    kept, taken = (
        torch.where(weight > 0, x.to(lse.dtype) * weight, 0.0 * weight) for x, weight in ((out, keep), (part, take))
    )
    return (kept + taken).to(dtype), total
