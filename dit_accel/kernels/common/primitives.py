"""What Triton kernels share on the device: rows of slots, which keys a query sees, a step of the online softmax."""

from __future__ import annotations

import triton
import triton.language as tl

LN_2_ = tl.constexpr(0.6931471805599453)


@triton.jit
def slot_rows(rows_ptr, slot, valid, HAS_ROWS: tl.constexpr):
    """Original rows of slots of the permuted sequence; slots that are not ``valid`` get row 0."""
    row = slot
    if HAS_ROWS:
        row = tl.load(rows_ptr + slot, mask=valid, other=0)
    return row


@triton.jit
def key_visibility(
    bits_ptr,
    bit_row,
    key_mask_ptr,
    key_slot,
    key_row,
    kv_len,
    offs_m,
    offs_n,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BITS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
):
    """bool ``[len(offs_m), len(offs_n)]``: which keys of a partial block the queries see.

    ``offs_m`` and ``offs_n`` count inside the block, ``key_slot`` inside the (permuted) sequence, and
    ``key_row`` is the original row of each key.
    """
    inside = key_slot < kv_len
    if HAS_KEY_MASK:
        inside = inside & (tl.load(key_mask_ptr + key_row, mask=inside, other=0) != 0)
    visible = inside[None, :] & (offs_m >= 0)[:, None]
    if HAS_BITS:
        words_per_row: tl.constexpr = BLOCK_K // 32
        word_offsets = offs_m[:, None] * words_per_row + (offs_n // 32)[None, :]
        # Row 0 stands in for "no bits": it exists, and what it says is overruled.
        base = bits_ptr + tl.maximum(bit_row, 0).to(tl.int64) * (BLOCK_Q * words_per_row)
        words = tl.load(base + word_offsets)
        words = tl.where(bit_row < 0, -1, words)
        visible = visible & (((words >> (offs_n % 32)[None, :]) & 1) != 0)
    return visible


@triton.jit
def online_softmax_update(scores, row_max, row_sum, MAY_SEE_NOTHING: tl.constexpr):
    """A step of the online softmax (FlashAttention-2) with scores in base 2: ``(p, row_max, row_sum, acc_scale)``.

    ``acc_scale`` is what the output so far is to be multiplied by. With ``MAY_SEE_NOTHING`` scores may be ``-inf``
    in a whole row, and ``row_max`` begins there; else it begins at a finite number.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    base = new_max
    if MAY_SEE_NOTHING:
        # A row that has seen nothing keeps -inf; 0 in its place avoids inf - inf.
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.math.exp2(scores - base[:, None])
    acc_scale = tl.math.exp2(row_max - base)
    row_sum = row_sum * acc_scale + tl.sum(p, 1)
    return p, new_max, row_sum, acc_scale
