"""What a selection offers to the engine."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from ..kernels import BlockMask
from ..plan import LayerMemory, SequenceBlocks

BLOCK_SIZES = (32, 64, 128)


class Select(Protocol):
    """A choice of key blocks for every query block; blocks with other tokens than latents are all kept."""

    @property
    def block(self) -> tuple[int, int]:
        """Tokens in a query and in a key block."""
        ...

    @property
    def is_static(self) -> bool:
        """Whether the choice depends on the layout alone."""
        ...

    def prepare(self, blocks: SequenceBlocks) -> Any:
        """What can be worked out once for a layout; given back to :meth:`select` as ``tables``."""
        ...

    def select(
        self,
        blocks: SequenceBlocks,
        tables: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None,
        scale: float | None,
        memory: LayerMemory | None = None,
    ) -> BlockMask:
        """Mask of one call, for queries and keys (B, S, H, D) in the model's order.

        Args:
            blocks: the permuted sequence.
            tables: what :meth:`prepare` returned for ``blocks``.
            key_mask: bool (B, S), visible keys, or None.
            scale: softmax scale, ``D ** -0.5`` if None.
            memory: what the layer keeps from one search to the next; None keeps nothing.
        """
        ...


def check_block(block: tuple[int, int]) -> None:
    """Raise unless ``block`` is a pair of block sizes that the kernels have."""
    if len(block) != 2 or any(size not in BLOCK_SIZES for size in block):
        raise ValueError(f"select.block must be two of {BLOCK_SIZES} tokens (query, key), got {block}.")


def check_share(name: str, value: float | None) -> None:
    """Raise unless ``value`` is None or a share in (0, 1]."""
    if value is not None and not 0.0 < value <= 1.0:
        raise ValueError(f"select.{name} must lie in (0, 1], got {value}.")
