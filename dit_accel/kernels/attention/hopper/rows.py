"""Where permuted rows begin in memory, for the warps of the Hopper kernel that move them."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def row_addresses(
    base, row_idx, chunk: gl.constexpr, stride, CHUNK: gl.constexpr, HEAD_DIM: gl.constexpr, LAYOUT: gl.constexpr
):
    """Addresses ``[CHUNK, HEAD_DIM]`` of a chunk's rows in a tensor whose rows start at multiples of 16 bytes."""
    row = row_idx.slice(chunk * CHUNK, CHUNK).load(gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LAYOUT))
    # In units of 16 bytes 32 bits are enough, and one instruction makes an address of them.
    at = (base + columns)[None, :] + ((row * (stride // 8)).to(gl.int64) * 8)[:, None]
    # Strides unknown to the compiler hide this from it; it would move 2 bytes at a time.
    return gl.max_contiguous(gl.multiple_of(at, [16, 16]), [1, 8])
