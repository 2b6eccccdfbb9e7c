"""Masks of the tokens in a pair of blocks, a bit each, as :class:`~dit_accel.kernels.BlockMask` holds them."""

from __future__ import annotations

import torch

WORD_BITS = 32
"""Tokens of a key block come in whole words."""


def pack_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """int32 ``[P, block_q, block_k // 32]`` from bool ``[P, block_q, block_k]``."""
    weights = torch.ones(32, dtype=torch.int64, device=tokens.device) << torch.arange(32, device=tokens.device)
    words = (tokens.unflatten(-1, (-1, 32)).long() * weights).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_tokens(packed: torch.Tensor) -> torch.Tensor:
    """bool ``[P, block_q, block_k]`` from int32 ``[P, block_q, block_k // 32]``."""
    places = torch.arange(32, dtype=torch.int32, device=packed.device)
    return (packed[..., None] >> places & 1).bool().flatten(-2)


def distinct(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct ones of int32 token masks ``[P, ...]``, and the row of each input: most repeat themselves."""
    flat = packed.flatten(1).long()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(1 << 62), 1 << 62, (flat.shape[1],), generator=generator).to(flat.device) | 1
    _, inverse = ((flat * weights).sum(1)).unique(return_inverse=True)
    count = int(inverse.max()) + 1
    first = torch.full((count,), len(flat), device=flat.device).scatter_reduce_(
        0, inverse, torch.arange(len(flat), device=flat.device), "amin"
    )
    if not torch.equal(packed[first][inverse], packed):  # a hash collision
        return packed, torch.arange(len(packed), device=packed.device)
    return packed[first].contiguous(), inverse
