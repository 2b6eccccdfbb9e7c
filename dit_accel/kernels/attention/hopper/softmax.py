"""Online softmax of the Hopper kernel: a warpgroup's scores S of one key block to probabilities P, in registers.

Rescaling is lazy, as in FlashAttention-4: ``row_max`` may stay below a row's largest score by RESCALE_THRESHOLD, and
only a warp in which a row exceeds that multiplies its sums, by ``acc_scale``. Scores are in base 2.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# A row's row_max before its first block: finite, so that no difference is NaN.
ROW_MAX_INIT = gl.constexpr(-3e38)
# Octaves by which a row's largest score may exceed row_max. None in e4m3: a row's largest probability is then exactly
# the largest number there is, and the error 1 % smaller.
RESCALE_THRESHOLD = gl.constexpr(8.0)
FP8_RESCALE_THRESHOLD = gl.constexpr(0.0)
# Probabilities are at most 1 then, and e4m3 holds 448: its base-2 logarithm, added to the exponents.
FP8_MAX_OFFSET = gl.constexpr(8.807354922057604)


@gluon.jit
def apply_mask(
    scores,
    block,
    bit_row,
    bits_ptr,
    key_mask_ptr,
    kv_len,
    WG: gl.constexpr,
    BLOCK_K: gl.constexpr,
    LAYOUT: gl.constexpr,
    HAS_BITS: gl.constexpr,
    HAS_KEY_MASK: gl.constexpr,
    ROWS: gl.constexpr = 128,
):
    """Scores of a partial block with ``-inf`` in place of every key that a query does not see.

    ``ROWS``: queries of a row of token bits, of which these are the ``WG``-th 64.
    """
    offs_n = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, LAYOUT))
    slot = block * BLOCK_K + offs_n
    inside = slot < kv_len
    if HAS_KEY_MASK:
        inside = inside & (gl.load(key_mask_ptr + slot, mask=inside, other=0) != 0)
    scores = gl.where(inside[None, :], scores, float("-inf"))
    if HAS_BITS:
        words_per_row: gl.constexpr = BLOCK_K // 32
        offs_m = WG * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
        base = bits_ptr + gl.maximum(bit_row, 0).to(gl.int64) * (ROWS * words_per_row)
        words = gl.load(base + offs_m[:, None] * words_per_row + (offs_n // 32)[None, :])
        seen = (((words >> (offs_n % 32)[None, :]) & 1) != 0) | (bit_row < 0)
        scores = gl.where(seen, scores, float("-inf"))
    return scores


@gluon.jit
def mask_two_blocks(
    scores,
    entry,
    count,
    full,
    at,
    bits_at,
    bits_ptr,
    key_mask_ptr,
    kv_len,
    WG: gl.constexpr,
    BLOCK_K: gl.constexpr,
    HAS_BITS: gl.constexpr,
    HAS_KEY_MASK: gl.constexpr,
):
    """:func:`apply_mask` of listed blocks ``entry`` and ``entry + 1``, side by side in ``scores [64, 2 * BLOCK_K]``.

    The first ``full`` of the list are left as they are. Behind its last one, the ``count``-th, nothing is seen.
    """
    LAYOUT: gl.constexpr = scores.type.layout
    halves = gl.split(scores.reshape([64, 2, BLOCK_K]).permute([0, 2, 1]))
    HALF: gl.constexpr = halves[0].type.layout
    first, second = halves
    block = gl.load(at + entry)
    bit_row = gl.load(bits_at + entry)
    masked = apply_mask(
        first, block, bit_row, bits_ptr, key_mask_ptr, kv_len, WG, BLOCK_K, HALF, HAS_BITS, HAS_KEY_MASK
    )
    first = gl.where(entry < full, first, masked)
    listed = entry + 1 < count
    block = gl.load(at + entry + 1, mask=listed, other=0)
    bit_row = gl.load(bits_at + entry + 1, mask=listed, other=0)
    # Past the last key where nothing is listed.
    block = gl.where(listed, block, kv_len // BLOCK_K + 1)
    masked = apply_mask(
        second, block, bit_row, bits_ptr, key_mask_ptr, kv_len, WG, BLOCK_K, HALF, HAS_BITS, HAS_KEY_MASK
    )
    second = gl.where(entry + 1 < full, second, masked)
    both = gl.join(first, second).permute([0, 2, 1]).reshape([64, 2 * BLOCK_K])
    return gl.convert_layout(both, LAYOUT, assert_trivial=True)


@gluon.jit
def by_thread(scores):
    """``[64, keys]`` as ``[64, keys / 8, 4, 2]``: keys ``8 n + 2 c + (0, 1)`` are held by lane ``c`` of four."""
    return scores.reshape([64, scores.shape[1] // 8, 4, 2])


@gluon.jit
def as_factor(values, wide):
    """``values [64, 4]``, of rows and the four threads that hold each, as a factor of ``wide`` (:func:`by_thread`)."""
    LANES: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, wide.type.layout))
    return gl.convert_layout(values, LANES, assert_trivial=True).expand_dims(1).expand_dims(3)


@gluon.jit
def as_rows(wide, like):
    """The inverse of :func:`by_thread`, in the layout of ``like``."""
    LAYOUT: gl.constexpr = like.type.layout
    return gl.convert_layout(wide.reshape([64, wide.shape[1] * 8]), LAYOUT, assert_trivial=True)


@gluon.jit
def update_row_max(block_max, row_max, threshold: gl.constexpr):
    """``(row_max, acc_scale, rescale)`` after another block, each ``[64, 4]``.

    ``block_max [64, 4]`` is the largest scaled score of the row in the block, in each of the four threads that hold the
    row. ``row_max`` may lie ``threshold`` octaves below a row's largest score: probabilities of ``2 ** threshold`` are
    as exact as those of 1 (FlashAttention-4). It is raised to that score, for all 16 rows of a warp, as soon as one of
    them needs it. ``rescale`` is 1 in the whole warp then, and older sums are to be multiplied by ``acc_scale``. In the
    other blocks the four threads need not hear of each other, which would take an eighth of the exponentials' time.
    """
    return gl.inline_asm_elementwise(
        """
        {
        .reg .pred low;
        .reg .f32 first, second, other;
        sub.f32 first, $6, $8;
        sub.f32 second, $7, $9;
        max.f32 first, first, second;
        setp.gt.f32 low, first, $10;
        vote.sync.any.pred low, low, 0xffffffff;
        selp.b32 $4, 1, 0, low;
        selp.b32 $5, 1, 0, low;
        mov.f32 $0, $8;
        mov.f32 $1, $9;
        mov.f32 $2, 0f3F800000;
        mov.f32 $3, 0f3F800000;
        @!low bra.uni kept;
        shfl.sync.bfly.b32 first, $6, 1, 31, 0xffffffff;
        shfl.sync.bfly.b32 second, $7, 1, 31, 0xffffffff;
        max.f32 first, first, $6;
        max.f32 second, second, $7;
        shfl.sync.bfly.b32 other, first, 2, 31, 0xffffffff;
        max.f32 first, first, other;
        shfl.sync.bfly.b32 other, second, 2, 31, 0xffffffff;
        max.f32 second, second, other;
        max.f32 $0, first, $8;
        max.f32 $1, second, $9;
        sub.f32 first, $8, $0;
        sub.f32 second, $9, $1;
        ex2.approx.ftz.f32 $2, first;
        ex2.approx.ftz.f32 $3, second;
        kept:
        }
        """,
        "=&f,=&f,=&f,=&f,=&r,=&r,f,f,f,f,f,f",
        [block_max, row_max, gl.full_like(row_max, threshold)],
        dtype=(gl.float32, gl.float32, gl.int32),
        is_pure=True,
        pack=2,
    )


def _rescale_assembly(elements: int) -> tuple[str, str]:
    """Assembly of :func:`rescale_o` for a thread's elements of two rows, and its constraints.

    A thread holds two columns of the first row, two of the second, and so on. What all of them share comes once for
    every element.
    """
    products = "".join(f"mul.f32 ${n}, ${n}, ${2 * elements + n % 4 // 2 * 2};" for n in range(elements))
    text = f"""
        {{
        .reg .pred raised;
        setp.ne.s32 raised, ${3 * elements}, 0;
        @!raised bra.uni kept;
        {products}
        kept:
        }}
        """
    # In place: copies would come between the products, which the assembler then waits for one by one.
    in_place = [str(n) for n in range(elements)]
    return text, ",".join(["=f"] * elements + in_place + ["f"] * elements + ["r"] * elements)


_TEXT_64, _CONSTRAINTS_64 = (gl.constexpr(x) for x in _rescale_assembly(32))
_TEXT_128, _CONSTRAINTS_128 = (gl.constexpr(x) for x in _rescale_assembly(64))


@gluon.jit
def rescale_o(acc, acc_scale, rescale):
    """``acc [64, D]`` times ``acc_scale`` in the warps whose ``rescale`` is 1, both ``[64, 4]``."""
    wide = by_thread(acc)
    factor, rescale = as_factor(acc_scale, wide), as_factor(rescale, wide)
    if acc.shape[1] == 64:
        wide = gl.inline_asm_elementwise(_TEXT_64, _CONSTRAINTS_64, [wide, factor, rescale], gl.float32, True, 32)
    else:
        wide = gl.inline_asm_elementwise(_TEXT_128, _CONSTRAINTS_128, [wide, factor, rescale], gl.float32, True, 64)
    return as_rows(wide, acc)


@gluon.jit
def rescale_and_add_o(acc, acc_scale, pv):
    """``acc * acc_scale + pv``, of 8-bit products, with ``acc_scale [64, 4]`` as in :func:`rescale_o`."""
    wide = by_thread(acc)
    return as_rows(wide * as_factor(acc_scale, wide), acc) + pv


@gluon.jit
def block_row_max(scores, score_scale):
    """Each row's largest scaled score, ``[64, 4]``: of what each of four threads holds of the row.

    ``score_scale`` is ``[64, 1]``, or ``[64, 4]`` with a key scale for each of the four. A row's even and odd columns
    are chains of their own: of integers the assembler takes three at a time of a chain.
    """
    wide = by_thread(scores)
    LANES: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, wide.type.layout))
    block_max = gl.convert_layout(gl.max(gl.max(wide, 1), 2), LANES, assert_trivial=True)
    return block_max.to(gl.float32) * score_scale


@gluon.jit
def scale_apply_exp2(scores, row_max, acc_scale, row_sum, score_scale, MAX_OFFSET: gl.constexpr):
    """float32 P = ``2 ** (MAX_OFFSET + scores * score_scale - row_max)`` of a block, and the row sums with it.

    ``row_sum [64, 4]`` stays apart for the threads that hold a row and is added up after the last block.
    """
    wide = by_thread(scores)
    offset = (row_max - MAX_OFFSET).expand_dims(1).expand_dims(3)
    p = gl.exp2(wide.to(gl.float32) * score_scale.expand_dims(1).expand_dims(3) - offset)
    row_sum = row_sum * acc_scale + gl.sum(gl.sum(p, 3), 1)
    return as_rows(p, scores), row_sum


@gluon.jit
def pack_p_fp8(p):
    """P in e4m3, four keys a word, in the order KEY_PLACE of the stored values.

    In this order the scores' registers are the operand's. Words, since the compiler would carry bytes from one
    block to the next one by one.
    """
    keys: gl.constexpr = p.shape[1]
    place = p.reshape([64, keys // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([64, keys // 4, 2, 2])
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
def unpack_p_fp8(words, OPERAND: gl.constexpr):
    """The words of :func:`pack_p_fp8` as left operand; no instruction, they are its registers."""
    keys: gl.constexpr = words.shape[1] * 4
    even = gl.join((words & 255).to(gl.uint8), ((words >> 16) & 255).to(gl.uint8))
    odd = gl.join(((words >> 8) & 255).to(gl.uint8), (words >> 24).to(gl.uint8))
    bits = gl.join(even, odd).reshape([64, keys])
    return gl.convert_layout(bits.to(gl.float8e4nv, bitcast=True), OPERAND, assert_trivial=True)
