"""Public attention operators. Nothing here imports Triton until a Triton kernel is asked for."""

from .block_mask import BlockMask

__all__ = ["BlockMask"]
