"""Whether sparse attention can gain anything at a layout."""

from __future__ import annotations

import torch

from .layout import TokenLayout

# Share of pairs that must be read above which the default stays dense.
MOST_FORCED = 0.7
# On a CPU dense attention is slow enough for a few thousand tokens to gain.
LEAST_ON_CPU = 2048


def why_not_worthwhile(layout: TokenLayout, device: torch.device, min_tokens: int) -> str | None:
    """Why it cannot, or None.

    Args:
        device: of the call: a model may be moved, or offloaded, after it was patched.
        min_tokens: sequence length from which it gains on a GPU.
    """
    least = min(min_tokens, LEAST_ON_CPU) if device.type == "cpu" else min_tokens
    if layout.seq_len < least:
        return f"{layout.seq_len} tokens, too few to gain (below {least})"
    share = layout.forced_share
    if share > MOST_FORCED:
        return f"{share:.2f} of all pairs are of text or references and must be read: too little is left to gain"
    return None
