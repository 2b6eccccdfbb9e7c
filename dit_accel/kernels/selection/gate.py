"""One threshold for all block pairs of a head: the selection of VMoBA (arXiv 2506.23858), "head_global"."""

from __future__ import annotations

import torch

from ..common.capability import why_not_kernels
from ..common.choice import Case, Choice, choose
from .api import own_blocks


def choose_gate(case: Case, backend: str = "auto") -> Choice:
    """The backend of :func:`select_by_threshold`; raises a ValueError if it is refused."""
    return choose("gate", backend, case, why_not_kernels(case))


def select_by_threshold(
    gates: torch.Tensor,
    threshold: float,
    *,
    block_q: int,
    block_k: int,
    seq_len: int,
    open_k: torch.Tensor | None = None,
    open_q: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The pairs of a head with the largest gates, until they hold ``threshold`` of the head's gates.

    Gates are scaled to [0, 1] per head. Pairs that share tokens are always kept; of the others, largest first
    and ties by index, those up to and including the first at which the kept gates reach the threshold.

    Args:
        gates: float32 ``[B, H, nq, nk]``.
        threshold: in (0, 1].
        block_q, block_k, seq_len: geometry in tokens.
        open_k, open_q: bool ``[B|1, H|1, nk]`` and ``[..., nq]``: blocks that take part; all when left out.
        backend: one of :data:`~dit_accel.kernels.BACKENDS`; ``"auto"`` is Triton on CUDA, which sums without sorting.

    Returns:
        bool ``[B, H, nq, nk]``, false for pairs that take no part.
    """
    if choose_gate(Case(gates.device), backend).name == "triton":
        from .triton.gate import select_by_threshold_triton

        return select_by_threshold_triton(gates, threshold, block_q, block_k, seq_len, open_k, open_q)
    pairs = torch.ones((1, 1, *gates.shape[2:]), dtype=torch.bool, device=gates.device)
    if open_k is not None:
        pairs = pairs & open_k[..., None, :]
    if open_q is not None:
        pairs = pairs & open_q[..., None]
    own = own_blocks(block_q, block_k, seq_len, seq_len, gates.device)
    return global_choice(gates, pairs.expand(gates.shape), own.expand(gates.shape), threshold)


def global_choice(gates: torch.Tensor, pairs: torch.Tensor, own: torch.Tensor, threshold: float) -> torch.Tensor:
    """VMoBA's "head_global" rule on gates ``[B, H, queries, chunks]``: which pairs are kept.

    Args:
        gates: any real numbers.
        pairs: bool, likewise: pairs that take part at all.
        own: bool, likewise: pairs of a query and its own chunk, always kept.
        threshold: share of the normalised gates to reach.
    """
    wide = gates.flatten(2).double()
    pairs, own = pairs.flatten(2), (own & pairs).flatten(2)
    low = wide.masked_fill(~pairs, torch.inf).amin(-1, keepdim=True)
    high = wide.masked_fill(~pairs, -torch.inf).amax(-1, keepdim=True)
    share = ((wide - low) / (high - low).clamp_min(torch.finfo(wide.dtype).tiny)).masked_fill(~pairs, 0.0)
    total = share.sum(-1, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)
    need = threshold - share.masked_fill(~own, 0.0).sum(-1, keepdim=True) / total
    others = share.masked_fill(own | ~pairs, -1.0)
    ranked, order = others.sort(dim=-1, descending=True, stable=True)
    gained = ranked.clamp_min(0.0).cumsum(-1) / total
    # A pair is kept if those before it do not suffice; the first is always kept, as in the released code.
    kept = torch.cat([torch.ones_like(gained[..., :1]).bool(), gained[..., :-1] < need], -1) & (ranked >= 0)
    chosen = torch.zeros_like(own).scatter_(-1, order, kept)
    return (chosen | own).view(gates.shape)
