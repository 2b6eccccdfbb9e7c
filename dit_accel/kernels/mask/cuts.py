"""Parts of a block mask, cut once for all calls that read the mask."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch

from .block_mask import BlockMask
from .packed import PackedBlockMask


@dataclass(frozen=True, eq=False)
class MaskCuts:
    """What was cut from one mask, as bits: their lists are unpacked for a call, small ones once and for all.

    It belongs to the mask that it is asked with, and goes where that one goes. Masks with token bits stay lists.
    """

    _cut: dict[Hashable, list[BlockMask | PackedBlockMask]] = field(default_factory=dict)

    def parts(
        self,
        mask: Callable[[], BlockMask],
        queries: slice,
        keys: Sequence[slice],
        *,
        key_mask: bool,
        keep: bool,
        backend: str = "auto",
    ) -> Callable[[int], BlockMask]:
        """The mask of a run of query blocks and of one of several runs of key blocks; cut when the first is asked for.

        Args:
            mask: gives the whole mask, where it was not cut so before.
            queries, keys: see :meth:`BlockMask.parts`.
            key_mask: whether a key mask made blocks partial.
            keep: False leaves nothing here: what a CUDA graph makes is its own.
            backend: see :meth:`BlockMask.parts`.
        """
        place = (queries.start, queries.stop, tuple((span.start, span.stop) for span in keys))
        fresh: list[BlockMask] = []

        def part(which: int) -> BlockMask:
            if fresh:
                return fresh[which]
            with torch.inference_mode(False), torch.no_grad():  # a training may save for its backward what this makes
                if place not in self._cut:
                    fresh.extend(mask().parts(queries, keys, backend))
                    if keep:
                        self._cut[place] = [_kept(one, key_mask, backend) for one in fresh]
                    return fresh[which]
                found = self._cut[place][which]
                return found.lists() if isinstance(found, PackedBlockMask) else found

        return part


def _kept(mask: BlockMask, key_mask: bool, backend: str) -> BlockMask | PackedBlockMask:
    return mask.trimmed() if mask.token_bits is not None else PackedBlockMask.of(mask, key_mask, backend)
