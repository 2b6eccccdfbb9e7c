"""Where the latents and their references lie in the sequence that a layer attends to."""

from __future__ import annotations

from math import prod

from ..layout import LatentGrid, TokenLayout
from .ambient import LatentTokens
from .families import Family
from .reasons import NO_LATENTS


def place_latents(family: Family, latents: LatentTokens, seq_len: int, masked: bool) -> TokenLayout | str:
    """The layout of a sequence of ``seq_len`` tokens, or the reason why none is known.

    Args:
        family: says on which side of the latents other tokens lie.
        latents: of the forward.
        masked: whether the call has a mask, which moves the text of some families.
    """
    if masked and family.masked == "apart":
        return "prompts of different lengths lie before the latents of a batch"
    text_first = family.text_first and not (masked and family.masked == "first")
    if len(latents.grid) == 3 and seq_len == prod(latents.grid):
        # Layers of the latents alone, before their stream meets its references.
        return TokenLayout((latents.grid[0], latents.grid[1], latents.grid[2]), 0, seq_len)
    extra = seq_len - latents.tokens
    if extra < 0 and family.latents_query:
        return NO_LATENTS
    if len(latents.grid) != 3 or extra < 0:
        return f"{seq_len} tokens do not hold the latent grid {latents.grid}"
    if extra and family.alone:
        return f"{extra} other tokens lie beside the latents, and no Family says where"
    offset = extra if text_first else 0
    references = tuple(LatentGrid((f, h, w), offset + start) for f, h, w, start in latents.references)
    return TokenLayout((latents.grid[0], latents.grid[1], latents.grid[2]), offset + latents.start, seq_len, references)
