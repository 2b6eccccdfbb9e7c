"""Means in the softmax of the Hopper kernel: of 64 at a time, what those of left-out blocks have for scores.

Every list of a call with means begins with all of them, :attr:`~.arguments.Means.steps` blocks of 64, which come
through the same buffers as keys and values: in a pair they are the first blocks that both lists hold. A query block
hides the means of what it reads.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .softmax import as_rows, by_thread


@gluon.jit
def kept_row(head, row, means):
    """Where the bits of a query block, the ``row``-th of a head, begin, and how many words there are: none of a second
    block of a last pair that is not there."""
    at = means.kept_ptr + head * means.kept_head_stride + row.to(gl.int64) * means.kept_words
    return at, gl.where(row < means.kept_rows, means.kept_words, 0)


@gluon.jit
def kept_of_step(step, at, words, PER_BLOCK: gl.constexpr):
    """Bits of the key blocks of a step's 64 means, the first in the lowest: of 32 and 32 with a mean for each block,
    else all in the first word. ``PER_BLOCK``, how many means a key block has, is a power of two. Set where nothing is.
    """
    first_bit = step * 64 // PER_BLOCK
    first = gl.load(at + first_bit // 32, mask=first_bit // 32 < words, other=-1)
    if PER_BLOCK == 1:
        return first, gl.load(at + first_bit // 32 + 1, mask=first_bit // 32 + 1 < words, other=-1)
    else:
        return first >> (first_bit % 32), first


@gluon.jit
def mean_scores(products, step, first, second, scale_log2, means, PER_BLOCK: gl.constexpr):
    """Scores ``[64, 64]`` in base 2 of a step's means, ``-inf`` where a query block reads what a mean is of.

    A mean of n tokens has ``log2(n)`` more than its product. ``first, second`` are those of :func:`kept_of_step`.
    """
    wide = by_thread(products)
    LAYOUT: gl.constexpr = wide.type.layout
    # A mean's number is 8 n + 2 c + j, where n and j are the compiler's and c, of four lanes, is a thread's own: what
    # is made of n and j alone takes no registers.
    n = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT))))
    c = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, LAYOUT))))
    j = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))))
    n, c, j = n[None, :, None, None], c[None, None, :, None], j[None, None, None, :]
    if PER_BLOCK == 1:
        kept = ((gl.where(n < 4, first, second) >> (2 * c)) >> (n % 4 * 8 + j)) & 1
    else:
        # All means of a thread's two neighbours are of one block.
        kept = ((first >> (2 * c // PER_BLOCK)) >> (8 * n // PER_BLOCK + 0 * j)) & 1
    weight = gl.where(kept != 0, float("-inf"), means.log2_tokens)
    left = means.whole - step * 64
    if left < 64:
        # The first mean of fewer tokens than the others, and behind it there is nothing.
        behind = 8 * n + j - (left - 2 * c)
        weight += gl.where(behind < 0, 0.0, gl.where(behind == 0, means.log2_rest - means.log2_tokens, float("-inf")))
    return as_rows(wide * scale_log2 + weight, products)
