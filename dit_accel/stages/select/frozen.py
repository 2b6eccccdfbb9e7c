"""Plans made offline: which key blocks each head reads, by noise level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...heads import HeadShard
from ...kernels import BlockMask
from ...kernels.mask.packed import unpack_bits
from ...layout import TokenLayout
from ...plan import SequenceBlocks
from .pooled import keep_chosen


@dataclass(frozen=True, eq=False)
class FrozenMasks:
    """Bit-packed block masks of one transformer, for one layout.

    Noise levels, not step numbers, find a mask: a run with more steps, fewer, or another scheduler uses the
    mask of the level it is at.

    Attributes:
        layout: of the sequence.
        block: tokens in a query and in a key block.
        edges: falling sigmas between neighbouring buckets, one fewer than buckets.
        bits: uint8 ``[buckets, layers, H, nq, ceil(nk / 8)]`` on the CPU; bit ``j % 8`` of byte ``j // 8`` of a
            row says whether key block ``j`` is read.
    """

    layout: TokenLayout
    block: tuple[int, int]
    edges: tuple[float, ...]
    bits: torch.Tensor

    def __post_init__(self) -> None:
        nq, nk = (-(-self.layout.seq_len // size) for size in self.block)
        wanted = (len(self.edges) + 1, nq, -(-nk // 8))
        found = (self.bits.shape[0], *self.bits.shape[3:]) if self.bits.dim() == 5 else tuple(self.bits.shape)
        if found != wanted or self.bits.dtype != torch.uint8:
            raise ValueError(
                f"frozen masks of {len(self.edges) + 1} buckets and {nq} x {nk} blocks must be uint8 "
                f"[{wanted[0]}, layers, heads, {nq}, {wanted[2]}], got {self.bits.dtype} {tuple(self.bits.shape)}."
            )

    def bucket(self, sigma: float) -> int:
        """The bucket of a noise level; levels beyond those calibrated belong to the nearest."""
        return sum(sigma < edge for edge in self.edges)

    def mask(
        self,
        layer: int,
        bucket: int,
        blocks: SequenceBlocks,
        key_mask: torch.Tensor | None,
        backend: str = "auto",
        heads: HeadShard | None = None,
    ) -> BlockMask:
        """The mask of a layer, or of some of its heads, with text and own blocks.

        Raises:
            ValueError: the masks are for fewer layers.
        """
        if layer >= self.bits.shape[1]:
            raise ValueError(f"The calibration is for {self.bits.shape[1]} layers, the model has a layer {layer}.")
        bits = self.bits[bucket, layer]
        bits = bits if heads is None else heads.own(bits, 0)
        chosen = unpack_bits(bits.to(blocks.device), blocks.num_blocks[1])[None]
        return keep_chosen(blocks, chosen, key_mask, backend)


def bucket_edges(sigmas: Sequence[float], buckets: int) -> tuple[float, ...]:
    """Edges for the falling sigmas of the sparse steps of a run: the last bucket has the second half of them,
    where attention changes little from step to step, and the others share the first half (PAROAttention)."""
    if buckets < 1:
        raise ValueError(f"buckets must be at least 1, got {buckets}.")
    first = sigmas[: -(-len(sigmas) // 2)]
    buckets = min(buckets, len(first) + (len(sigmas) > len(first)))
    if buckets == 1:
        return ()
    cuts = [round(len(first) * n / (buckets - 1)) for n in range(1, buckets)]
    return tuple((sigmas[cut - 1] + sigmas[cut]) / 2 for cut in dict.fromkeys(cuts) if 0 < cut < len(sigmas))
