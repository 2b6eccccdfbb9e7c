"""Means as the Hopper kernel reads them: matrices of mean keys and values, and words of bits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...common.launch import ceil_div
from ..means import LeftOutMeans

STEP = 64
"""Means of a step of the kernel."""
_WORD = 4  # bytes


@dataclass(frozen=True, eq=False)
class MeanInputs:
    """What a launch takes of :class:`LeftOutMeans`.

    Attributes:
        keys, values: of the call's dtype: ``[B, H, n, D]`` where a head has whole steps, else ``[B, n, H, D]``, in
            which a last step ends with the matrix and not in the next head.
        kept: int32 ``[B|1, H|1, nq, words]``.
        stacked: which of the two.
        per_block: means of a key block.
        numbers: the kernel's arguments behind ``kept``.
    """

    keys: torch.Tensor
    values: torch.Tensor
    kept: torch.Tensor
    stacked: bool
    per_block: int
    numbers: tuple[int | float, ...]


def mean_inputs(given: LeftOutMeans, dtype: torch.dtype) -> MeanInputs:
    """Nothing is copied where means have the call's dtype, a head's are whole steps and rows of bits whole words."""
    means = given.means
    _, _, number, dim = means.keys.shape
    keys, values = (x.to(dtype).contiguous() for x in (means.keys, means.values))
    stacked = number % STEP == 0
    if not stacked:
        keys, values = (x.transpose(1, 2).contiguous() for x in (keys, values))
    kept = given.kept.contiguous()
    _, heads, rows, bytes_of_row = kept.shape
    if bytes_of_row % _WORD or kept.data_ptr() % _WORD:
        kept = F.pad(kept, (0, -bytes_of_row % _WORD)).clone()
    kept = kept.view(torch.int32)
    words = kept.shape[3]
    whole, rest = divmod(means.kv_len, means.tokens)
    numbers = (
        *(rows * words if heads > 1 else 0, rows, words),
        *(ceil_div(number, STEP), whole),
        *((number, 0) if stacked else (0, dim)),
        *(math.log2(means.tokens), math.log2(rest) if rest else -math.inf),
    )
    return MeanInputs(keys, values, kept, stacked, means.block_k // means.tokens, numbers)
