"""Public attention operators. Nothing here imports Triton until a Triton kernel is asked for.

``block_mass.block_mass`` and ``linear_branch.linear_branch`` stay in the modules whose names they share.
"""

from .attention.api import block_sparse_attention, choose_backend
from .common.choice import BACKENDS, Choice
from .common.quantized_inputs import PRECISIONS, QuantizedInputs
from .linear.api import FEATURE_MAPS, add_linear_branch, plus_linear_branch
from .mask.block_mask import BlockMask
from .pyramid.api import pyramid_attention
from .quantized.api import quantize_inputs, quantized_block_sparse_attention
from .selection.api import pool_blocks, pooled_scores, select_blocks, select_pooled
from .selection.rectified import add_pooled_compensation

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
