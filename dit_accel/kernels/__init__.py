"""Public attention operators. Nothing here imports Triton until a Triton kernel is asked for."""

from .block_mask import BlockMask
from .block_sparse import BACKENDS, block_sparse_attention, choose_backend
from .quantize import PRECISIONS, QuantizedInputs
from .quantized import QUANTIZED_BACKENDS, quantize_inputs, quantized_block_sparse_attention

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "QUANTIZED_BACKENDS",
    "BlockMask",
    "QuantizedInputs",
    "block_sparse_attention",
    "choose_backend",
    "quantize_inputs",
    "quantized_block_sparse_attention",
]
