"""Public attention operators. Nothing here imports Triton until a Triton kernel is asked for."""

from .block_mask import BlockMask
from .block_sparse import BACKENDS, block_sparse_attention, choose_backend

__all__ = ["BACKENDS", "BlockMask", "block_sparse_attention", "choose_backend"]
