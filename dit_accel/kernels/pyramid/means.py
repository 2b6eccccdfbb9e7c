"""Attention goes on over the means of the blocks that it left out: the coarsest level of a pyramid, in one softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..common.capability import why_not_tiles
from ..common.choice import Case, Choice, case_of, choose
from ..common.tokens import gather_rows
from ..mask.packed import unpack_bits

LOGITS_AT_ONCE = 1 << 27
"""The torch version holds about this many logits at a time."""


@dataclass(frozen=True, eq=False)
class BlockMeans:
    """Mean keys and values of runs of slots: of whole key blocks, or of as many runs in each of them.

    Attributes:
        keys, values: ``[B, H, n, D]``, of any floating-point dtype; a run without visible tokens has any finite ones.
        tokens: slots in a run; the last one ends with the sequence.
        block_k: slots in a key block, a multiple of ``tokens``.
        kv_len: slots in all.
        visible: float32 ``[B|1, H|1, n]``, how many of a run's tokens a key mask shows; None where it shows all.
    """

    keys: torch.Tensor
    values: torch.Tensor
    tokens: int
    block_k: int
    kv_len: int
    visible: torch.Tensor | None = None

    @property
    def counts(self) -> torch.Tensor:
        """float32 ``[B|1, H|1, n]``: tokens that each mean stands for."""
        if self.visible is not None:
            return self.visible
        first = torch.arange(self.keys.shape[2], device=self.keys.device) * self.tokens
        return (self.kv_len - first).clamp(max=self.tokens).float()[None, None]


def choose_means(case: Case, backend: str = "auto") -> Choice:
    """The backend of :func:`add_left_out_means`; raises a ValueError if it is refused."""
    return choose("residual", backend, case, why_not_tiles(case._replace(blocks=None)))


@torch.no_grad()
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
    rounded as keys are, and sums in float32. The torch version computes in float32.

    Args:
        out: ``[B, Sq, H, D]``, attention to the kept blocks, in the model's order. It and ``lse`` may be overwritten.
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
    if choose_means(case_of(q), backend).name == "triton" and lse.dtype == torch.float32:
        from .triton.means import add_left_out_means_triton

        return add_left_out_means_triton(out, lse, q, means, kept, block_q, rows, scale)
    batch, length, heads, _ = q.shape
    slots = None if rows is None else rows.long().expand(batch, heads, length)
    queries = gather_rows(q, rows)
    keys, values, bias = means.keys.float(), means.values.float(), means.counts.log()  # log 0: no weight
    read = unpack_bits(kept, -(-means.kv_len // means.block_k))
    read = read.repeat_interleave(means.block_k // means.tokens, 3)[..., : keys.shape[2]]
    rest, rest_lse = torch.empty_like(out), torch.empty_like(lse)
    group = max(1, LOGITS_AT_ONCE // (batch * heads * block_q * keys.shape[2]))
    for first in range(0, read.shape[2], group):
        run = slice(first * block_q, min((first + group) * block_q, length))
        asked = queries[:, :, run].float()
        hidden = read[:, :, first : first + group].repeat_interleave(block_q, 2)[:, :, : asked.shape[2]]
        logits = asked @ keys.transpose(-1, -2) * scale + bias[:, :, None]
        logits = logits.masked_fill(hidden, -torch.inf)
        total = logits.logsumexp(-1)
        weights = torch.exp(logits - total.masked_fill(total == -torch.inf, 0.0)[..., None])
        found = (weights @ values).to(out.dtype)
        if slots is None:
            rest[:, run] = found.transpose(1, 2)
            rest_lse[:, :, run] = total
        else:
            places = slots[:, :, run]
            rest_lse.scatter_(2, places, total.to(lse.dtype))
            wide = places.transpose(1, 2)[..., None].expand(-1, -1, -1, out.shape[-1])
            rest.scatter_(1, wide, found.transpose(1, 2))
    both = torch.logaddexp(lse, rest_lse)
    # Nothing left out: also where a row sees no key at all.
    share = torch.where(rest_lse == -torch.inf, 0.0, torch.exp(rest_lse - both))
    share = share.transpose(1, 2)[..., None].float()
    return torch.lerp(out.float(), rest.float(), share).to(out.dtype), both
