"""How far queries and keys have moved since a plan was made."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..call import AttentionCall
from ..kernels.selection.api import pool_blocks
from .select.means import own_key_mask


@dataclass(frozen=True, eq=False)
class BlockMeans:
    """Mean query and mean key of every block, in the model's order: what a block selection mostly looks at.

    The change between two of them is a sum of absolute differences, as in HASTE (arXiv 2605.14513), taken
    relative to the earlier means so that one bound suits every layer.

    Attributes:
        q: float32 ``[B, H, nq, D]``.
        k: float32 ``[B, H, nk, D]``.
    """

    q: torch.Tensor
    k: torch.Tensor

    @classmethod
    def of(cls, call: AttentionCall, block: tuple[int, int]) -> BlockMeans:
        """Means of a call's queries and keys; hidden keys do not count."""
        backend = call.backend("selection")
        return cls(
            pool_blocks(call.q, block[0], backend=backend),
            pool_blocks(call.k, block[1], key_mask=own_key_mask(call), backend=backend),
        )

    def change_since(self, earlier: BlockMeans, call: AttentionCall) -> torch.Tensor:
        """The larger of the relative changes of q and of k, a 0-d tensor on the device; of all heads and tokens of the
        call, whichever processes have them."""
        sums = call.of_all(
            torch.stack(
                [
                    part.abs().sum()
                    for now, then in ((self.q, earlier.q), (self.k, earlier.k))
                    for part in (now - then, then)
                ]
            )
        ).view(2, 2)
        return (sums[:, 0] / sums[:, 1].clamp_min(torch.finfo(sums.dtype).tiny)).max()
