"""Public attention operators. Nothing here imports Triton until a Triton kernel is asked for.

``block_mass.block_mass`` and ``linear_branch.linear_branch`` stay in the modules whose names they share.
"""

from .block_mask import BlockMask
from .block_sparse import block_sparse_attention, choose_backend
from .choice import BACKENDS, Choice
from .linear_branch import FEATURE_MAPS, add_linear_branch, plus_linear_branch
from .pyramid import pyramid_attention
from .quantize import PRECISIONS, QuantizedInputs
from .quantized import quantize_inputs, quantized_block_sparse_attention
from .rectified import add_pooled_compensation
from .selection import pool_blocks, pooled_scores, select_blocks, select_pooled

__all__ = [
    "BACKENDS",
    "FEATURE_MAPS",
    "PRECISIONS",
    "BlockMask",
    "Choice",
    "QuantizedInputs",
    "add_linear_branch",
    "add_pooled_compensation",
    "block_sparse_attention",
    "choose_backend",
    "plus_linear_branch",
    "pool_blocks",
    "pooled_scores",
    "pyramid_attention",
    "quantize_inputs",
    "quantized_block_sparse_attention",
    "select_blocks",
    "select_pooled",
]
