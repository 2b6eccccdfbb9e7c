"""Attention goes on over the means of the blocks that it left out: the coarsest level of a pyramid, in one softmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..attention.means import BlockMeans
from ..common.capability import why_not_tiles
from ..common.choice import Case, Choice, case_of, choose
from ..common.tokens import gather_rows
from ..mask.packed import unpack_bits

LOGITS_AT_ONCE = 1 << 27
"""The torch version holds about this many logits at a time."""


def choose_means(case: Case, backend: str = "auto") -> Choice:
    """The backend of :func:`add_left_out_means`; raises a ValueError if it is refused."""
    return choose("residual", backend, case, why_not_tiles(case._replace(blocks=None)))


def add_left_out_means(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    means: BlockMeans,
    kept: torch.Tensor,
    *,
    block_q: int,
    rows: torch.Tensor | None = None,
    scale: float,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to the kept blocks and, in the same softmax, to the means of all others.

    A mean of n tokens has the logit ``scale * q . mean(k) + ln n``. In Triton one launch: each program begins its
    online softmax with what attention to the kept blocks ended with. It multiplies in q's dtype, to which means are
    rounded as keys are, and sums in float32. The torch version computes in float32 or float64, and is differentiable in
    ``out``, ``lse``, ``q`` and the means; a gradient is its own also where ``backend`` is another.

    Args:
        out: ``[B, Sq, H, D]``, attention to the kept blocks, in the model's order. It and ``lse`` may be overwritten,
            but where a gradient needs them.
        lse: ``[B, H, Sq]`` of it, natural logarithm; ``-inf`` where a query saw nothing.
        q: ``[B, Sq, H, D]``, any strides.
        kept: uint8 ``[B|1, H|1, nq, ceil(nk / 8)]``, the bits of a
            :class:`~dit_accel.kernels.mask.packed.PackedBlockMask`: key blocks that were read.
        block_q: tokens in a query block.
        rows: int32 or int64 ``[B|1, H|1, Sq]``, the token that each slot of the queries has. Means are of slots as
            they are.
        scale: of the logits.
        backend: one of :data:`~dit_accel.kernels.BACKENDS`; ``"auto"`` is Triton on CUDA.

    Returns:
        Output in ``out``'s dtype and log-sum-exp, both in the model's order.
    """
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (out, lse, q, means.keys, means.values))
    if not learns and choose_means(case_of(q), backend).name == "triton" and lse.dtype == torch.float32:
        from .triton.means import add_left_out_means_triton

        return add_left_out_means_triton(out, lse, q, means, kept, block_q, rows, scale)
    length = q.shape[1]
    padding = -length % block_q
    queries = F.pad(gather_rows(q, rows), (0, 0, 0, padding))
    slots = None if rows is None else rows.long().expand(q.shape[0], q.shape[2], length)
    before = F.pad(lse if slots is None else lse.gather(2, slots), (0, padding))
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = means.keys.to(wide) * scale, means.values.to(wide)
    read = unpack_bits(kept, -(-means.kv_len // means.block_k))
    read = read.repeat_interleave(means.block_k // means.tokens, 3)[..., : keys.shape[2]]
    bias = means.counts.log()[:, :, None].masked_fill(read, -torch.inf)  # log 0: no weight
    parts = []
    group = max(1, LOGITS_AT_ONCE // (q.shape[0] * q.shape[2] * block_q * keys.shape[2]))
    for first in range(0, read.shape[2], group):
        run = slice(first * block_q, (first + group) * block_q)
        work = (queries[:, :, run], before[:, :, run], keys, values, bias[:, :, first : first + group])
        parts.append(checkpoint(_over_means, *work, use_reentrant=False) if learns else _over_means(*work))
    rest, share, total = (torch.cat(part, 2)[:, :, :length] for part in zip(*parts, strict=True))
    rest, share, total = rest.to(out.dtype), share[..., None], total.to(lse.dtype)
    if slots is not None:
        total = torch.empty_like(total).scatter(2, slots, total)
        share = torch.empty_like(share).scatter(2, slots[..., None], share)
        rest = torch.empty_like(rest).scatter(2, slots[..., None].expand_as(rest), rest)
    return (out.to(wide) * share.transpose(1, 2)).add_(rest.transpose(1, 2)).to(out.dtype), total


def _over_means(
    queries: torch.Tensor, lse: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What means add to the output of whole query blocks, the share that is left to the rest, and the log-sum-exp.

    Args:
        queries: ``[B, H, n * block_q, D]`` of n blocks.
        lse: ``[B, H, n * block_q]`` without means.
        keys, values: ``[B, H, m, D]`` of the dtype to compute in, the keys scaled.
        bias: float32 ``[B|1, H|1, n, m]``, -inf where a block reads what a mean is of.
    """
    logits = queries.to(keys.dtype) @ keys.transpose(-1, -2)
    logits.unflatten(2, (bias.shape[2], -1)).add_(bias[:, :, :, None])
    base = torch.maximum(lse, logits.amax(-1)).detach()
    base = base.masked_fill(base == -torch.inf, 0.0)
    weights = logits.sub_(base[..., None]).exp_()
    kept = torch.exp(lse - base)
    total = kept + weights.sum(-1)
    # A row may see no key at all.
    divisor = torch.where(total == 0.0, 1.0, total)
    return (weights @ values).div_(divisor[..., None]), kept / divisor, base + total.log()
