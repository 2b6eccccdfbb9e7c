"""Where the latents and their references lie in the sequence that a layer attends to."""

from __future__ import annotations

from math import prod

import torch

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


class ReadPlaces:
    """The places that one family read last from positions on the device, for all forwards that are given the same.

    Reading waits for all that the device was asked for before, and a pipeline hands the same positions to every step.
    """

    def __init__(self) -> None:
        # Held, so that nobody else gets their memory meanwhile.
        self._ids: torch.Tensor | None = None
        self._version = 0
        self._read: tuple[int, LatentTokens] | None = None

    def place(self, family: Family, latents: LatentTokens) -> LatentTokens:
        """What :meth:`~.families.Family.place` gives for tokens known by their positions."""
        ids, known = latents.ids, self._read
        assert ids is not None
        if known is not None and known[0] == latents.tokens and self._holds(ids):
            return known[1]
        found = family.place(latents)
        # Nobody counts what changes a tensor of inference mode.
        kept = None if ids.is_inference() else ids.detach()
        self._ids, self._version = kept, 0 if kept is None else kept._version
        self._read = (latents.tokens, found)
        return found

    def _holds(self, ids: torch.Tensor) -> bool:
        """Whether these are the positions that were read: the same memory, unchanged since."""
        held = self._ids
        return (
            held is not None
            and not ids.is_inference()
            and (held.data_ptr(), held._version, held.shape, held.stride(), held.dtype, held.device)
            == (ids.data_ptr(), self._version, ids.shape, ids.stride(), ids.dtype, ids.device)
            and ids._version == self._version
        )
