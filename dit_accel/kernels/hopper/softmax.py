"""Softmax of the Hopper kernel: a warpgroup's scores of one key block to weights, in registers."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Weights are at most 1 and e4m3 holds 448: its base-2 logarithm, added to the exponents.
FP8_LIFT = gl.constexpr(8.807354922057604)
# 1.5 * 2**23: as bits of a float32, integers of less than 2**22 added to them are added to the number.
INTEGER_BIAS = gl.constexpr(12582912.0)
INTEGER_BIAS_BITS = gl.constexpr(0x4B400000)


@gluon.jit
def hide_keys(
    scores,
    block,
    bit_row,
    bits_ptr,
    key_mask_ptr,
    kv_len,
    HALF: gl.constexpr,
    BLOCK_K: gl.constexpr,
    LAYOUT: gl.constexpr,
    HAS_BITS: gl.constexpr,
    HAS_KEY_MASK: gl.constexpr,
):
    """Scores of a partial block with ``-inf`` in place of every key that a query does not see."""
    offs_n = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, LAYOUT))
    slot = block * BLOCK_K + offs_n
    inside = slot < kv_len
    if HAS_KEY_MASK:
        inside = inside & (gl.load(key_mask_ptr + slot, mask=inside, other=0) != 0)
    scores = gl.where(inside[None, :], scores, float("-inf"))
    if HAS_BITS:
        words_per_row: gl.constexpr = BLOCK_K // 32
        offs_m = HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
        base = bits_ptr + gl.maximum(bit_row, 0).to(gl.int64) * (128 * words_per_row)
        words = gl.load(base + offs_m[:, None] * words_per_row + (offs_n // 32)[None, :])
        seen = (((words >> (offs_n % 32)[None, :]) & 1) != 0) | (bit_row < 0)
        scores = gl.where(seen, scores, float("-inf"))
    return scores


@gluon.jit
def by_thread(scores):
    """``[64, keys]`` as ``[64, keys / 8, 4, 2]``: keys ``8 n + 2 c + (0, 1)`` are held by lane ``c`` of four."""
    return scores.reshape([64, scores.shape[1] // 8, 4, 2])


@gluon.jit
def raise_peak(scores, peak, factor, BIASED: gl.constexpr):
    """Each row's largest scaled score so far.

    ``factor`` is ``[64, 1]``, or ``[64, 4]`` with a key scale for each of the four lanes that hold a row: all that a
    thread holds of a row has one factor, so that nothing more is done for an element. Maxima begin with pairs, since
    one chain over a row's 32 elements takes longer than the exponentials beside it.
    """
    largest = gl.max(gl.max(by_thread(scores), 3), 1)
    if BIASED:
        largest -= INTEGER_BIAS
    return gl.maximum(peak, gl.convert_layout(gl.max(largest * factor, 1), peak.type.layout))


@gluon.jit
def online_softmax(scores, peak, new_peak, total, factor, LIFT: gl.constexpr, BIASED: gl.constexpr):
    """float32 weights ``2 ** (LIFT + scores * factor - new_peak)`` of a block, row sums, and what shrinks older sums.

    ``peak`` and ``total`` are those of the blocks before. ``total [64, 4]`` stays apart for the lanes that hold a row
    and is added up after the last block.

    ``BIASED`` scores are larger by ``INTEGER_BIAS`` than the products; taking it off in the exponent rounds by at
    most one unit of an integer product, a hundredth of what rounding q and k to INT8 does.
    """
    wide = by_thread(scores)
    LANES: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, wide.type.layout))
    # A row that has seen nothing keeps peak -inf; 0 in its place avoids inf - inf.
    base = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    offset = gl.convert_layout(base - LIFT, gl.SliceLayout(1, LANES))[:, None]
    if BIASED:
        offset = offset + INTEGER_BIAS * factor
    weights = gl.exp2(wide * factor.expand_dims(1).expand_dims(3) - offset.expand_dims(1).expand_dims(3))
    shrink = gl.exp2(peak - base)
    total = total * gl.convert_layout(shrink, gl.SliceLayout(1, LANES))[:, None] + gl.sum(gl.sum(weights, 3), 1)
    flat = weights.reshape([64, scores.shape[1]])
    return gl.convert_layout(flat, scores.type.layout, assert_trivial=True), total, shrink


@gluon.jit
def scores_as_float(products, BIASED: gl.constexpr):
    """float32 of the integer or float32 products; biased ones are the bits of a float already."""
    if BIASED:
        return products.to(gl.float32, bitcast=True)
    return products.to(gl.float32)


@gluon.jit
def pack_fp8(weights):
    """e4m3 weights, four keys a word, in the order KEY_PLACE of the stored values.

    In this order the scores' registers are the operand's. Words, since the compiler would carry bytes from one
    block to the next one by one.
    """
    keys: gl.constexpr = weights.shape[1]
    place = weights.reshape([64, keys // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([64, keys // 4, 2, 2])
    even, odd = gl.split(place)
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }
        """,
        "=r,f,f,f,f",
        [first, second, third, fourth],
        dtype=gl.uint32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def unpack_fp8(words, OPERAND: gl.constexpr):
    """The words of :func:`pack_fp8` as left operand; no instruction, they are its registers."""
    keys: gl.constexpr = words.shape[1] * 4
    even = gl.join((words & 255).to(gl.uint8), ((words >> 16) & 255).to(gl.uint8))
    odd = gl.join(((words >> 8) & 255).to(gl.uint8), (words >> 24).to(gl.uint8))
    bits = gl.join(even, odd).reshape([64, keys])
    return gl.convert_layout(bits.to(gl.float8e4nv, bitcast=True), OPERAND, assert_trivial=True)
