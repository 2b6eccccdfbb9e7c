"""Random calls of the attention operator, each from a seed and a number."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dit_accel.kernels import BlockMask
from tests.kernels.oracle import poison_unlisted

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 72, 96, 128, 256)
BLOCKS = (16, 32, 64, 128)
PAIRS = tuple((block_q, block_k) for block_q in BLOCKS for block_k in BLOCKS)
HOPPER = tuple((128, block_k, dim) for block_k in (64, 128) for dim in (64, 128))
# A float32 product is unrolled into single instructions: larger tiles take minutes to compile.
LARGEST_TILE, LARGEST_GRADIENT_TILE = 64 * 64 * 128, 32 * 32 * 128

# Sizes of a shape. Triton compiles anew for strides and counts that are 1 or multiples of 16, so each size is one more
# compilation, and a size that nobody has seen costs a call a second: each shape has so many, and thousands of calls.
SIZES = 6

LAYOUTS = ("rows of heads", "heads first", "one projection", "shifted", "heads alike", "batch alike", "channels apart")
VALUES = ("normal", "normal", "large channels", "large keys", "large values", "alike", "zero")


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for: calls of one shape share their compiled code.

    Attributes:
        layout: how q, k and v lie in memory, one of :data:`LAYOUTS`.
        permuted, bits, hidden: whether there are rows, token bits, a key mask.
        gradients: whether dq, dk and dv are computed too.
    """

    dtype: torch.dtype
    dim: int
    block_q: int
    block_k: int
    layout: str
    permuted: bool
    bits: bool
    hidden: bool
    gradients: bool


def shapes(seed: int) -> list[Shape]:
    """The shapes of a seed, dtypes in turn, about 140."""
    chance = random.Random(seed)
    found: dict[torch.dtype, list[Shape]] = {}
    for dtype in DTYPES:
        # Every pair of blocks, and every head dim, several times; all pairs of these, over the seeds.
        start = chance.randrange(80)
        sizes = [
            (*PAIRS[n % 16], HEAD_DIMS[n % 5]) for n in range(start, start + (80 if dtype == torch.float32 else 40))
        ]
        if dtype == torch.float32:
            sizes = [size for size in sizes if tile(*size) <= LARGEST_TILE][:24]
        else:
            sizes += [chance.choice(HOPPER) for _ in range(12)]
        found[dtype] = [_shape(chance, dtype, size) for size in sizes]
    longest = max(map(len, found.values()))
    return [some[n] for n in range(longest) for some in found.values() if n < len(some)]


def tile(block_q: int, block_k: int, dim: int) -> int:
    """Products of a tile, the head dim padded as the kernels do."""
    return block_q * block_k * (1 << (dim - 1).bit_length())


def _shape(chance: random.Random, dtype: torch.dtype, size: tuple[int, int, int]) -> Shape:
    block_q, block_k, dim = size
    small = dtype != torch.float32 or tile(*size) <= LARGEST_GRADIENT_TILE
    return Shape(
        dtype=dtype,
        dim=dim,
        block_q=block_q,
        block_k=block_k,
        # The Hopper kernel wants the first.
        layout=LAYOUTS[0] if size in HOPPER and chance.random() < 0.8 else chance.choice(LAYOUTS),
        permuted=chance.random() < 0.5,
        bits=block_k % 32 == 0 and chance.random() < 0.4,
        hidden=chance.random() < 0.5,
        gradients=small and chance.random() < 0.35,
    )


@dataclass(eq=False)
class Call:
    """One call.

    Attributes:
        q, k, v: ``[B, S, H, D]``, strided as the shape says.
        visible: bool ``[B|1, H|1, S, S]`` in slot order, from what the mask was made of.
        unread: bool ``[B, H, S]`` in the model's order: keys of blocks that no query block lists.
        grad, grad_lse: gradients of the output and the log-sum-exp, or None.
    """

    number: int
    shape: Shape
    values: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: BlockMask
    rows: torch.Tensor | None
    key_mask: torch.Tensor | None
    scale: float | None
    visible: torch.Tensor
    unread: torch.Tensor
    grad: torch.Tensor | None
    grad_lse: torch.Tensor | None

    def describe(self) -> str:
        s, (batch, length, heads, _) = self.shape, self.q.shape
        extras = [name for name in ("permuted", "bits", "hidden", "gradients") if getattr(s, name)]
        lead = "x".join(map(str, self.mask.kv_num_blocks.shape[:2]))
        return (
            f"{str(s.dtype)[6:]} [{batch}, {length}, {heads}, {s.dim}] blocks {s.block_q}x{s.block_k}, mask {lead}, "
            f"{s.layout}, {self.values}, scale {self.scale}{''.join(', ' + extra for extra in extras)}"
        )


def draw(seed: int, number: int, shape: Shape, size: int, device: torch.device, longest: int) -> Call:
    """A call of a shape, in one of its :data:`SIZES`; on devices of one kind always the same.

    Lengths, heads and what is shared by batch and heads follow from the size, contents from the number.
    """
    chance = random.Random(f"{seed} {number}")
    fixed = random.Random(f"{seed} {shape} {size}")
    generator = torch.Generator(device).manual_seed(chance.getrandbits(62))

    def uniform(*size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator, device=device)

    batch, heads = fixed.randint(1, 3), fixed.randint(1, 4)
    if shape.dim % 16:
        heads = 2 * ((heads + 1) // 2)  # an odd number of them has other strides, and is another compilation
    length = _length(fixed, shape, longest)
    values = chance.choice(VALUES)
    q, k, v = _tensors(chance, generator, shape, values, (batch, length, heads, shape.dim), device)
    rows = key_mask = None
    if shape.permuted:
        lead = fixed.choice(((1, 1), (1, heads), (batch, heads), (batch, 1)))
        rows = uniform(*lead, length).argsort(-1).to(fixed.choice((torch.int32, torch.int64)))
        if fixed.random() < 0.3:
            rows = rows.expand(batch, heads, length)
    if shape.hidden:
        key_mask = uniform(batch, length) >= chance.choice((0.0, 0.05, 0.5, 0.9))
        if chance.random() < 0.5:
            key_mask[chance.randrange(batch), chance.randrange(length) :] = False
        if chance.random() < 0.2:
            key_mask[chance.randrange(batch)] = False
    mask, visible, keep = _mask(chance, fixed, uniform, generator, shape, batch, heads, length, rows, key_mask)
    scale = None if chance.random() < 0.7 else 10 ** chance.uniform(-1.5, 0.4) * shape.dim**-0.5
    read = keep.any(2).repeat_interleave(shape.block_k, -1)[..., :length].expand(batch, heads, length)
    if rows is not None:
        read = torch.zeros_like(read, memory_format=torch.contiguous_format).scatter_(
            2, rows.long().expand(batch, heads, length), read.contiguous()
        )
    grad = grad_lse = None
    if shape.gradients:
        grad = torch.randn(q.shape, generator=generator, device=device).to(shape.dtype)
        grad_lse = torch.randn((batch, heads, length), generator=generator, device=device)
        if fixed.random() < 0.2:
            grad = grad[..., :1].expand(q.shape)
    return Call(number, shape, values, q, k, v, mask, rows, key_mask, scale, visible, ~read, grad, grad_lse)


def _length(chance: random.Random, shape: Shape, longest: int) -> int:
    length = round(math.exp(chance.uniform(0.0, math.log(longest))))
    if chance.random() < 0.3:  # at the border of a block
        block = max(shape.block_q, shape.block_k)
        length = round(length / block) * block + chance.randint(-1, 1)
    return min(max(length, 1), longest)


def _tensors(
    chance: random.Random,
    generator: torch.Generator,
    shape: Shape,
    values: str,
    size: tuple[int, int, int, int],
    device: torch.device,
) -> list[torch.Tensor]:
    """q, k and v with outliers, and then in the shape's layout."""
    _, length, _, dim = size
    found = torch.randn((3, *size), generator=generator, device=device)
    if values == "large channels":
        found[:2, ..., [chance.randrange(dim) for _ in range(3)]] *= 30
    elif values == "large keys":
        found[1, :, [chance.randrange(length) for _ in range(2)]] *= 30
    elif values == "large values":
        found[2] *= torch.where(torch.rand(size, generator=generator, device=device) < 0.01, 30.0, 1.0)
    elif values == "alike":
        found[1] = found[1, :, :1].clone()
    elif values == "zero":
        found[chance.randrange(2)] = 0.0
    found = found.to(shape.dtype)
    if shape.layout == "heads first":
        return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in found]
    if shape.layout == "one projection":
        return list(found.permute(1, 2, 0, 3, 4).contiguous().unbind(2))
    if shape.layout == "shifted":
        return [torch.nn.functional.pad(x, (1, 7))[..., 1:-7] for x in found]
    if shape.layout == "heads alike":
        return [found[0], *(x[:, :, :1].expand(size) for x in found[1:])]
    if shape.layout == "batch alike":
        return [x[:1].expand(size) for x in found]
    if shape.layout == "channels apart":
        return [x.transpose(1, 3).contiguous().transpose(1, 3) for x in found]
    return list(found)


def _mask(
    chance: random.Random,
    fixed: random.Random,
    uniform: Callable[..., torch.Tensor],
    generator: torch.Generator,
    shape: Shape,
    batch: int,
    heads: int,
    length: int,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
) -> tuple[BlockMask, torch.Tensor, torch.Tensor]:
    """The mask, the visible pairs of slots, and the kept pairs of blocks."""
    block_q, block_k = shape.block_q, shape.block_k
    nq, nk = -(-length // block_q), -(-length // block_k)
    lead = (fixed.choice((1, batch)), fixed.choice((1, heads)))
    keep = uniform(*lead, nq, nk) < chance.choice((0.05, 0.2, 0.5, 0.9, 1.0))
    if chance.random() < 0.5:
        keep[..., 0] |= ~keep.any(-1)  # else some rows may have no block
    device = keep.device
    slot = torch.arange(length, device=device)
    i, j = slot // block_q, slot // block_k
    visible = keep[:, :, i][..., j]
    partial = uniform(*lead, nq, nk) < chance.choice((0.0, 0.1))
    bit_rows = token_bits = None
    if shape.bits:
        words = (chance.randint(1, 5), block_q, block_k // 32)
        token_bits = torch.randint(-(2**31), 2**31, words, generator=generator, device=device).to(torch.int32)
        token_bits[chance.randrange(words[0]), : chance.randint(0, block_q)] = chance.choice((0, -1))
        bit_rows = (uniform(*lead, nq, nk) * 2 * words[0]).to(torch.int32) - words[0]
        bit_rows = bit_rows.clamp_min(-1)
        partial |= bit_rows >= 0
        row, inside = bit_rows[:, :, i][..., j], slot % block_k
        word = token_bits[row.clamp_min(0).long(), (slot % block_q)[:, None], inside // 32]
        visible &= (row < 0) | (word >> (inside % 32) & 1).bool()
    if key_mask is not None:
        seen = key_mask[:, None]
        if rows is not None:
            seen = seen.expand(batch, rows.shape[1], length).gather(2, rows.long().expand(batch, -1, -1))
        visible = visible & seen[:, :, None]
        hidden = torch.nn.functional.pad(~seen, (0, nk * block_k - length)).unflatten(-1, (nk, block_k)).any(-1)
        for axis in range(2):
            hidden = hidden.any(axis, keepdim=True) if lead[axis] == 1 else hidden
        partial |= hidden[:, :, None]
    mask = BlockMask.from_dense(
        keep, block_q, block_k, length, length, partial=partial, bit_rows=bit_rows, token_bits=token_bits
    )
    poison_unlisted(mask)
    # A trimmed mask is as wide as its longest row, which only its contents tell.
    return (mask.trimmed() if fixed.random() < 0.15 else mask), visible, keep
