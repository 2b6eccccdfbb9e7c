"""Where the latents and their references lie in the sequence that a layer attends to."""

from __future__ import annotations

import weakref
from math import prod
from typing import Any

import torch

from ..layout import LatentGrid, TokenLayout
from ..run import Run
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
    """The places that one family read last from positions on the device, for all forwards of a run that are given the
    same.

    Reading waits for all that the device was asked for before, and a pipeline hands the same positions to every step.
    """

    def __init__(self) -> None:
        # Held, so that nobody else gets their memory meanwhile. The addresses are read before: a graph that runs
        # again takes its tensors back, and whoever asks one then for its address gets an error.
        self._ids: torch.Tensor | None = None
        self._key: tuple[Any, ...] | None = None
        self._run: weakref.ref[Run] | None = None
        self._read: LatentTokens | None = None
        # Whether a graph may write into them, once that was asked.
        self._of_graph: bool | None = None

    def place(self, family: Family, latents: LatentTokens, run: Run | None) -> LatentTokens:
        """What :meth:`~.families.Family.place` gives for tokens known by their positions.

        Args:
            run: of the forward; None outside any, where one forward after another may be given the same.
        """
        ids = latents.ids
        assert ids is not None
        key = _key_of(latents.tokens, ids)
        if self._read is not None and key == self._key and self._lasts(run):
            return self._read
        found = family.place(latents)
        self._ids, self._key = ids.detach(), key
        self._run, self._read, self._of_graph = None if run is None else weakref.ref(run), found, None
        return found

    def _lasts(self, run: Run | None) -> bool:
        """Whether positions that nobody is known to have changed are still those that were read.

        A CUDA graph that computes positions, or a kernel that nobody told torch of, writes to the same address and
        counts no version; of tensors of inference mode nobody counts any. A run has the same positions in all its
        steps; outside a run such memory is read each time.
        """
        if run is not None:
            return self._run is not None and self._run() is run
        assert self._ids is not None
        if self._run is not None or self._ids.is_inference():
            return False
        if self._of_graph is None:
            self._of_graph = is_of_graph(self._ids)
        return not self._of_graph


def _key_of(tokens: int, ids: torch.Tensor) -> tuple[Any, ...]:
    """By what positions are known: the same memory, unchanged as far as torch counts."""
    version = None if ids.is_inference() else ids._version
    return tokens, ids.data_ptr(), version, ids.shape, ids.stride(), ids.dtype, ids.device


def is_of_graph(tensor: torch.Tensor) -> bool:
    """Whether replays of a CUDA graph may write into a tensor: its memory is not of the common pool, by the
    allocator's own account, which takes milliseconds; or the allocator gives no account."""
    if tensor.device.type != "cuda":
        return False
    if torch.cuda.memory.get_allocator_backend() != "native":
        return True
    address = tensor.data_ptr()
    for segment in torch.cuda.memory_snapshot():
        inside = segment["address"] <= address < segment["address"] + segment["total_size"]
        if inside and segment["device"] == tensor.device.index:
            return bool(tuple(segment["segment_pool_id"]) != (0, 0))
    return True  # of another library, which counts no versions either
