"""Attention to parts of the keys, put together by their log-sum-exps."""

from __future__ import annotations

import torch

from ..common.capability import choose_selection
from ..common.choice import Case


@torch.no_grad()
def merge_attention(
    out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor, backend: str = "auto"
) -> None:
    """Take attention to further keys into ``out`` and ``lse``, in place.

    A softmax over two sets of keys is the mean of the softmaxes over each, weighted by their denominators (blockwise
    attention, arXiv 2310.01889). A row that saw no key yet has log-sum-exp ``-inf``; so has one whose part saw none.

    Args:
        out: ``[B, S, H, D]`` contiguous, in float32 or float64.
        lse: ``[B, H, S]`` contiguous, natural logarithm, in the same.
        part: ``[B, S, H, D]``, of any floating-point dtype.
        part_lse: ``[B, H, S]``, in ``lse.dtype``.
        backend: one of :data:`~dit_accel.kernels.BACKENDS`; ``"auto"`` is Triton on CUDA.
    """
    if choose_selection(Case(out.device), backend).name == "triton" and out.dtype == torch.float32:
        from .triton.merge import merge_triton

        merge_triton(out, lse, part, part_lse)
        return
    total = torch.logaddexp(lse, part_lse)
    # Where neither saw a key: exp(-inf - -inf) is NaN.
    base = total.masked_fill(total == -torch.inf, 0.0)
    keep, take = ((x - base).exp().transpose(1, 2)[..., None] for x in (lse, part_lse))
    # A NaN of a part whose weight is 0 must not come through.
    out.mul_(keep).add_(torch.where(take > 0, part.to(out.dtype) * take, 0.0 * take))
    lse.copy_(total)
