"""What an attention mask of pairs says of keys alone."""

from __future__ import annotations

import torch

from ..layout import TokenLayout

# Rows compared at a time: a mask of pairs of a long video fills gigabytes.
_PAIRS_AT_A_TIME = 2**28


def is_of_pairs(mask: torch.Tensor, seq_len: int) -> bool:
    """Whether a mask is bool ``[B, 1, S, S]``, one bit for each query and key."""
    return mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1:] == (1, seq_len, seq_len)


def key_mask_of_pairs(mask: torch.Tensor, layout: TokenLayout) -> torch.Tensor | None:
    """The key mask bool ``[B, S]`` that a mask of pairs bool ``[B, 1, S, S]`` stands for; None if it says more.

    A mask of keys x queries hides whole rows too: those of padding. No token that matters reads them, and the model
    drops what they attend to, so that they may as well attend. Every other row must hide the same keys as a latent's.
    Waits for the device.
    """
    pairs = mask[:, 0]
    keys = pairs[:, layout.latent_start].clone()  # else it would keep all pairs in memory
    matters = keys.clone()
    matters[:, layout.latent_start : layout.latent_start + layout.num_latent] = True
    alike = torch.ones((), dtype=torch.bool, device=mask.device)
    rows = max(1, _PAIRS_AT_A_TIME // pairs[:, 0].numel())
    for part, of_part in zip(pairs.split(rows, 1), matters.split(rows, 1), strict=True):
        alike &= ((part == keys[:, None]) | ~of_part[:, :, None]).all()
    return keys if bool(alike) else None
