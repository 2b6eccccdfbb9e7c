"""What the property tests draw: layouts, block masks, tensors, and fields of recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dit_accel.kernels import BlockMask
from dit_accel.layout import LatentGrid, TokenLayout
from tests.kernels.oracle import poison_unlisted


def times(factor: float) -> settings:
    """So many times the profile's examples: fewer of what is slow, more of what has many sides."""
    return settings(max_examples=max(1, round(settings.default.max_examples * factor)))


def booleans(*shape: int) -> st.SearchStrategy[torch.Tensor]:
    """bool tensors."""
    return arrays.arrays(np.bool_, shape).map(torch.from_numpy)


def normal(seed: int, *shape: int) -> torch.Tensor:
    """Normal numbers of a drawn seed: drawing each would be slow, and shrinking them of no use."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


seeds = st.integers(0, 2**31)


@st.composite
def layouts(draw: st.DrawFn, side: int = 6, extra: int = 9, least: int = 1, references: int = 2) -> TokenLayout:
    """Small grids, of ``least`` to ``side`` tokens a side, with up to ``extra`` other tokens before, between and behind
    them. What is generated may stand anywhere among up to ``references`` others."""
    grid = st.tuples(*[st.integers(least, side)] * 3)
    grids, at = [], 0
    for _ in range(draw(st.integers(1, 1 + references))):
        at += draw(st.integers(0, extra))
        grids.append(LatentGrid(draw(grid), at))
        at = grids[-1].stop
    generated = grids.pop(draw(st.integers(0, len(grids) - 1)))
    return TokenLayout(generated.grid, generated.start, at + draw(st.integers(0, extra)), tuple(grids))


@dataclass(frozen=True, eq=False)
class DrawnMask:
    """A mask and what it was made of: bool ``[B, H, nq, nk]`` each, and rows of ``token_bits``, -1 for none."""

    mask: BlockMask
    keep: torch.Tensor
    partial: torch.Tensor
    bit_rows: torch.Tensor

    def tokens(self) -> torch.Tensor:
        """bool ``[B, H, q_len, kv_len]``, token by token from the definition."""
        mask = self.mask
        m, n = torch.arange(mask.q_len), torch.arange(mask.kv_len)
        i, j = (m // mask.block_q)[:, None], (n // mask.block_k)[None]
        seen = self.keep[:, :, i, j]
        if mask.token_bits is not None:
            row = torch.where(self.partial, self.bit_rows, -1)[:, :, i, j]
            inside = (n % mask.block_k)[None]
            words = mask.token_bits[row.clamp_min(0).long(), (m % mask.block_q)[:, None], inside // 32]
            seen = seen & ((row < 0) | (words >> (inside % 32) & 1).bool())
        return seen


@st.composite
def masks(draw: st.DrawFn, bits: bool | None = None) -> DrawnMask:
    """Masks of all shapes; entries past the lists' ends hold nonsense, as the contract allows."""
    with_bits = draw(st.booleans()) if bits is None else bits
    block_q = draw(st.sampled_from((1, 5, 16, 32)))
    block_k = draw(st.sampled_from((32, 64) if with_bits else (1, 7, 16, 64)))
    q_len, kv_len = draw(st.integers(1, 4 * block_q)), draw(st.integers(1, 9 * block_k))
    nq, nk = -(-q_len // block_q), -(-kv_len // block_k)
    lead = (draw(st.integers(1, 2)), draw(st.integers(1, 3)))
    keep, marked = draw(booleans(*lead, nq, nk)), draw(booleans(*lead, nq, nk))
    bit_rows = torch.full((*lead, nq, nk), -1, dtype=torch.int32)
    token_bits = None
    if with_bits:
        rows = draw(st.integers(1, 3))
        words = arrays.arrays(np.int32, (rows, block_q, block_k // 32))
        token_bits = torch.from_numpy(draw(words))
        bit_rows = torch.from_numpy(draw(arrays.arrays(np.int32, bit_rows.shape, elements=st.integers(-1, rows - 1))))
    partial = keep & marked
    if kv_len % block_k:
        partial[..., -1] |= keep[..., -1]
    mask = BlockMask.from_dense(
        keep,
        block_q,
        block_k,
        q_len,
        kv_len,
        partial=marked if draw(st.booleans()) or marked.any() else None,
        bit_rows=bit_rows if with_bits else None,
        token_bits=token_bits,
    )
    poison_unlisted(mask)
    return DrawnMask(mask, keep, partial, bit_rows)


odd_numbers = st.sampled_from((0.0, -0.0, 1.0, 1.0, -1.0, 2.5, 1e-42, -3e38, 3e38, torch.inf, -torch.inf, torch.nan))


def scores(*shape: int) -> st.SearchStrategy[torch.Tensor]:
    """float32 scores with ties, infinities and NaN."""
    ordinary = st.floats(-30, 30, width=32)
    return arrays.arrays(np.float32, shape, elements=st.one_of(ordinary, odd_numbers)).map(torch.from_numpy)


def spelled(value: Any) -> str:
    """A field's value as a command line has it."""
    return value if isinstance(value, str) else repr(value)
