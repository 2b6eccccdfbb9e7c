"""Launch of the Hopper kernel: which calls it can run, and the call, half precision in place or quantised.

Blocks of 64 queries are taken two at a time; blocks of 128 keys are then two of 64.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...common.capability import compute_capability, multiprocessors
from ...common.compiled import MOST_KEPT, CompiledVariants
from ...common.launch import LOG2_E, int32_rows, list_strides
from ...common.quantized_inputs import QuantizedInputs
from ...common.zeroed import ZeroedPieces
from ...mask.block_mask import BlockMask
from ...mask.query_pairs import QueryPairs, query_pairs
from ..means import LeftOutMeans
from .kernel import hopper_fwd_kernel
from .mean_inputs import mean_inputs

_ROWS = 64  # query rows of a consumer warpgroup
PAIR_KEYS = 64  # keys of a block of pairs: of 128, two stages would fill shared memory, and pairs need three
_SHARED_BYTES = 224 << 10  # of 227 KiB: barriers and alignment take a little
# What keys and values in order may take in a permuted call, of the bytes of q, k, v and the output. Two heads do where
# all query blocks read alike; one that reads everything holds its head for long.
RING_SHARE = 0.15
_VARIANTS = CompiledVariants()
# Attributes of descriptors by what was checked of them.
_DESCRIPTORS: dict[Hashable, dict[str, Any]] = {}
_NO_MEANS = (None,) * 12
_NEW_TILES = TensorDescriptor.__new__
_FORMS: dict[Hashable, Form] = {}


@dataclass(frozen=True)
class HopperConfig:
    """Buffers of key and value blocks, of pairs three at least, and whether the consumers take turns at products.

    Attributes:
        ring: heads of a permuted call whose keys and values are in order at a time, in place of :func:`ring_heads`.
        wide_steps: two listed blocks of 64 keys are a step, and have one stage. Half precision, blocks of 128 queries,
            head dim 64.
        keep_q: whether consumers keep queries in registers; as a rule, in place of None, where a step has 64 keys.
            With so few a product reads as many bytes of q as of k, and shared memory could not keep up.
    """

    stages: int
    take_turns: bool
    ring: int | None = None
    wide_steps: bool = False
    keep_q: bool | None = None


def why_not_hopper(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask, rows: torch.Tensor | None
) -> str | None:
    """Why this kernel cannot run a half-precision call that the Triton backend can, or None if it can."""
    reason = why_not_shape(q, mask)
    if reason is not None:
        return reason
    for name, x in (("q", q), ("k", k), ("v", v)):
        reason = _why_not_tiles(x, by_head=rows is None)
        if reason is not None:
            return f"{name} {reason}"
    return None


def _why_not_tiles(x: torch.Tensor, by_head: bool = True) -> str | None:
    """Why tiles of ``[B, S, H, D]`` cannot be copied by the hardware, or None if they can."""
    batch, token, head, column = x.stride()
    if column != 1 or (by_head and head != x.shape[3]):
        return "does not have its heads side by side"
    if x.data_ptr() % 16 or (batch | token | head) % 8:  # of two bytes each
        return "is not aligned to 16 bytes"
    return None


def why_not_shape(q: torch.Tensor, mask: BlockMask) -> str | None:
    """Why this kernel can take neither these inputs nor a quantised copy of them, or None if it can."""
    if not q.is_cuda or compute_capability(q.device.index or 0) != (9, 0):
        return "it needs a GPU of compute capability 9.0"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 or bfloat16, got {q.dtype}"
    if q.shape[-1] not in (64, 128):
        return f"it takes head dims 64 and 128, got {q.shape[-1]}"
    if mask.block_q not in (64, 128) or mask.block_k not in (64, 128):
        return f"it takes blocks of 64 or 128 queries and keys, got {mask.block_q}x{mask.block_k}"
    return None


def why_not_means(mask: BlockMask, key_mask: torch.Tensor | None, means: LeftOutMeans) -> str | None:
    """Why a half-precision call of this kernel cannot attend means in its launch, or None if it can."""
    if mask.block_q != _ROWS and (mask.block_k != PAIR_KEYS or means.means.keys.shape[3] != 128):
        return f"means are read 64 a step, and a step of 128 queries has {mask.block_k} keys or two blocks"
    if key_mask is not None or means.means.visible is not None:
        return "keys are hidden"
    if mask.token_bits is not None:
        return "the mask has token bits"
    return None


def default_config(
    block_k: int,
    dim: int,
    precision: str | None,
    permuted: bool = False,
    has_bits: bool = False,
    pairs: bool = False,
) -> HopperConfig:
    """The fastest that was measured at head dim 128, and buffers that fit shared memory elsewhere.

    ``precision`` is None for half-precision inputs. ``has_bits``: many blocks have token bits, and applying them takes
    a consumer longer than its turn should. ``pairs``: two blocks of 64 queries a program; with turns a block that
    is late would hold up both consumers.
    """
    half = 2 * dim
    in_row = half if precision is None else dim
    value_row = dim if precision == "int8_fp8" else half
    # Outputs of quantised calls have a buffer of their own, and so has a block on its way into order.
    other = 128 * half if precision is not None else block_k * half if permuted else 0
    wide = precision is None and not pairs and block_k == dim == 64
    step_keys = 2 * block_k if wide else block_k
    stages = (_SHARED_BYTES - 2 * 128 * in_row - other) // (step_keys * (in_row + value_row))
    most = (3 if precision == "int8" else 4) * 128 // step_keys
    return HopperConfig(
        min(most, stages),
        take_turns=not (has_bits or pairs or wide) and (block_k == 128 if precision else 64 in (block_k, dim)),
        wide_steps=wide,
    )


def ring_heads(batch: int, heads: int) -> int:
    """Heads whose keys and values are in order at a time, two at least: what :data:`RING_SHARE` allows."""
    return min(heads, max(2, int(2 * RING_SHARE * batch * heads)))


class _Matrix(NamedTuple):
    """Rows that lie ``stride`` elements apart from where ``begin`` does; a view of each would be one more operation of
    the host."""

    begin: torch.Tensor
    length: int
    width: int
    stride: int


def _tiles(x: _Matrix, rows: int, columns: int) -> TensorDescriptor:
    """Tiles ``[rows, columns]`` of a matrix; what lies past its last row reads as zero and is not written."""
    begin, *sizes = x
    key = (*sizes, begin.dtype, rows, columns)
    kept = _DESCRIPTORS.get(key)
    if kept is not None and begin.data_ptr() % 16 == 0:
        # Of a matrix like this one all else was checked, which takes as long as to launch the kernel.
        tiles = _NEW_TILES(TensorDescriptor)
        tiles.__dict__.update(kept)
        tiles.base = begin
        return tiles
    layout = _shared_layout(begin.element_size(), columns)
    tiles = TensorDescriptor(begin, [x.length, x.width], [x.stride, 1], [rows, columns], layout)
    if len(_DESCRIPTORS) >= MOST_KEPT:
        _DESCRIPTORS.clear()
    _DESCRIPTORS[key] = vars(tiles) | {"base": None}  # which would keep its memory
    return tiles


@cache
def _shared_layout(element_bytes: int, columns: int) -> gl.NVMMASharedLayout:
    swizzle = min(128, columns * element_bytes)
    return gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=8 * element_bytes, rank=2)


def _side_by_side(x: torch.Tensor, entry: int) -> _Matrix:
    """An entry of ``[B, S, H, D]`` with adjacent heads as the matrix ``[S, H * D]``."""
    _, length, heads, dim = x.shape
    return _Matrix(_entry(x, entry), length, heads * dim, x.stride(1))


def _stacked(x: torch.Tensor) -> _Matrix:
    """``[N, S, D]`` as the matrix ``[N * S, D]``."""
    number, length, width = x.shape
    return _Matrix(x.contiguous(), number * length, width, width)


def _stacked_entry(x: torch.Tensor, entry: int) -> _Matrix:
    """An entry of a contiguous ``[B, N, S, D]`` as the matrix ``[N * S, D]``."""
    _, number, length, width = x.shape
    return _Matrix(_entry(x, entry), number * length, width, width)


def _entry(x: torch.Tensor, entry: int) -> torch.Tensor:
    """What the pointer of a batch entry is taken from; a batch of one, or one that serves all, needs no view."""
    return x if x.shape[0] == 1 else x[entry]


def _in_slot_order(key_mask: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """A key mask ``[B, S]`` as ``[B, H|1, S]`` by slots: for every key its row would be read first, one load more."""
    key_mask = key_mask[:, None]
    if rows is None:
        return key_mask.contiguous()
    shape = (max(key_mask.shape[0], rows.shape[0]), *rows.shape[1:])
    return key_mask.expand(shape).gather(2, rows.long().expand(shape))


def hopper_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    scale: float,
    *,
    quantized: QuantizedInputs | None = None,
    config: HopperConfig | None = None,
    pieces: ZeroedPieces | None = None,
    means: LeftOutMeans | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``out [B, Sq, H, D]`` and ``lse [B, H, Sq]`` of a call for which ``why_not_hopper`` found nothing.

    With ``quantized``, made from the same q, k, v and rows, the numbers come from there; q, k and v then only
    give shapes and the output dtype.

    ``pieces`` give the kernel's counters; without them a call makes its own.

    With ``means`` queries attend those of what they leave out too, in the same softmax: in calls for which
    :func:`why_not_means` found nothing.
    """
    with torch.cuda.device_of(q):
        return _launch(q, k, v, mask, rows, key_mask, scale, quantized, config, pieces, means)


class Form(NamedTuple):
    """What calls have in common that differ in nothing but where their tensors lie.

    Attributes:
        grid: programs of a launch.
        ring: heads whose keys and values are in order at a time; all of them where none are moved.
        constants: of the kernel, by name.
        numbers: arguments behind the tensors, up to the scale of the logits.
        key: what decides the compiled variant, but for how tensors are aligned.
    """

    grid: tuple[int, int, int]
    ring: int
    constants: dict[str, Any]
    numbers: tuple[int, ...]
    key: tuple[Hashable, ...]


def _form_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: BlockMask | QueryPairs,
    nq: int,
    rows: torch.Tensor | None,
    hidden: bool,
    quantized: QuantizedInputs | None,
    config: HopperConfig | None,
    means_per_block: int,
) -> Form:
    """The form of a call, worked out once; ``nq`` counts what a tile has of queries, a block or a pair of them."""
    paired = isinstance(lists, QueryPairs)
    has_bits = lists.kv_bits is not None and lists.token_bits.shape[0] > 0
    thread_scales = quantized is not None and quantized.scales_by_thread
    fp8 = quantized is not None and quantized.v_scale is not None
    planes = None if quantized is None else (quantized.q.shape[2], quantized.k.shape[2])
    programs = multiprocessors(q.device.index or 0)
    asked = (
        *(q.device, q.dtype, q.shape, q.stride(), k.shape, k.stride(), v.stride(), lists.block_k, paired, nq),
        *(lists.kv_indices.shape, None if rows is None else rows.shape, hidden, has_bits, planes, fp8, thread_scales),
        config,
        programs,
        means_per_block,
    )
    found = _FORMS.get(asked)
    if found is not None:
        return found
    batch, q_len, heads, dim = q.shape
    precision = None if quantized is None else "int8_fp8" if fp8 else "int8"
    block_k = lists.block_k
    config = config or default_config(block_k, dim, precision, rows is not None, has_bits, paired)
    moved = rows is not None and quantized is None
    ring = min(config.ring or ring_heads(batch, heads), heads) if moved else heads
    constants = {
        "BLOCK_K": block_k,
        "HEAD_DIM": dim,
        "STAGES": config.stages,
        "PERMUTED": rows is not None,
        "HAS_BITS": has_bits,
        "HAS_KEY_MASK": hidden,
        "TAKE_TURNS": config.take_turns,
        "QUANTIZED": quantized is not None,
        "FP8": fp8,
        "THREAD_SCALES": thread_scales,
        "PAIRED": paired,
        "WIDE_STEPS": config.wide_steps,
        "KEEP_Q": block_k == 64 and not config.wide_steps if config.keep_q is None else config.keep_q,
        "MEANS": means_per_block,
    }
    # The output is contiguous.
    strides = (*q.stride()[1:3], k.stride(1), v.stride(1), k.stride(2), v.stride(2), heads * dim, dim)
    numbers = (
        *strides,
        list_strides(rows, q_len)[1],
        nq,
        nq * heads,
        list_strides(lists.kv_indices, nq)[1],
        lists.kv_indices.shape[-1],
        *((0, 0, dim) if planes is None else (*planes, 0)),
        ring,
        q_len,
        k.shape[1],
    )
    key = (q.device, q.dtype, strides, *constants.values())
    if len(_FORMS) >= MOST_KEPT:
        _FORMS.clear()
    found = _FORMS[asked] = Form((min(nq * heads, programs), 1, 1), ring, constants, numbers, key)
    return found


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    scale: float,
    quantized: QuantizedInputs | None,
    config: HopperConfig | None,
    pieces: ZeroedPieces | None,
    given_means: LeftOutMeans | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, q_len, heads, dim = q.shape
    out = torch.empty((batch, q_len, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=q.device)
    rows = int32_rows(rows)
    lists: BlockMask | QueryPairs = mask
    if mask.block_q == _ROWS:
        lists = query_pairs(mask, PAIR_KEYS, "triton")
        counts = fulls = lists.header
        nq = counts.shape[2]
    else:
        counts, fulls = mask.kv_num_blocks.contiguous(), mask.kv_num_full.contiguous()
        nq = mask.num_blocks[0]
    means = None if given_means is None else mean_inputs(given_means, q.dtype)
    per_block = 0 if means is None else means.per_block
    form = _form_of(q, k, v, lists, nq, rows, key_mask is not None, quantized, config, per_block)
    block_k, fp8 = lists.block_k, form.constants["FP8"]
    values = None if quantized is None or fp8 else quantized.v
    if values is not None and _why_not_tiles(values) is not None:
        values = values.contiguous()
    k_scale = None if quantized is None else quantized.k_scale
    if k_scale is not None and mask.block_k != block_k:
        # Both halves of a block of keys have its scales.
        k_scale = k_scale.repeat_interleave(mask.block_k // block_k, 2)
    moved = rows is not None and quantized is None
    if moved:
        in_order = torch.empty((2, 1, k.shape[1], form.ring, dim), dtype=k.dtype, device=k.device).unbind()
    index = lists.kv_indices.contiguous()
    bit_rows = index if lists.kv_bits is None else lists.kv_bits.contiguous()
    bits = index if lists.token_bits is None else lists.token_bits.contiguous()
    hidden = index if key_mask is None else _in_slot_order(key_mask, rows).view(torch.uint8)
    perm = index if rows is None else rows
    # Of each batch entry: tiles that were taken (beyond the first of each program), and of a permuted call the pieces
    # of keys and values, and for every head the full and the empty semaphore of the ring.
    num_counters = 2 + 2 * heads if moved else 1
    if pieces is None:
        counters = torch.zeros((batch, num_counters), dtype=torch.int32, device=q.device)
    for b in range(batch):
        q_in: torch.Tensor
        if quantized is None:
            q_in = _entry(q, b)
            keys = (_entry(k, b), _entry(v, b))
            k_in, v_in = (_side_by_side(x, 0 if moved else b) for x in (in_order if moved else (k, v)))
            q_tiles = _tiles(k_in if moved else _side_by_side(q, b), _ROWS, dim)
            scales = (lse, lse, lse, lse)
        else:
            q_in = quantized.q[b]
            k_in = _stacked(quantized.k[b])
            v_in = _stacked(quantized.v[b]) if values is None else _side_by_side(values, b)
            q_tiles = _tiles(_stacked(q_in), _ROWS, dim)
            keys = (q_in, q_in)
            v_scale = lse if quantized.v_scale is None else quantized.v_scale[b]
            scales = (quantized.q_scale[b], k_scale[b], v_scale, quantized.q_shift[b])
        hidden_in = _entry(hidden, b)
        of_means: tuple[Any, ...] = _NO_MEANS
        if means is not None:
            matrix = _stacked_entry if means.stacked else _side_by_side
            of_means = (
                *(_tiles(matrix(x, b), block_k, dim) for x in (means.keys, means.values)),
                _entry(means.kept, b),
                *means.numbers,
            )
        args = (
            q_tiles,
            _tiles(k_in, block_k, dim),
            _tiles(v_in, dim, block_k) if fp8 else _tiles(v_in, block_k, dim),
            _tiles(_side_by_side(out, b), _ROWS, dim),
            q_in,
            *keys,
            _entry(out, b),
            _entry(lse, b),
            *scales,
            _entry(counts, b),
            _entry(fulls, b),
            _entry(index, b),
            _entry(bit_rows, b),
            bits,
            _entry(perm, b),
            hidden_in,
            _entry(counters, b) if pieces is None else pieces.take(num_counters, q.device),
            *form.numbers,
            scale * LOG2_E,
            *of_means,
        )
        # Triton specialises on dtypes, strides and the alignment of what the kernel does not name as starting anywhere.
        aligned = tuple([x.data_ptr() % 16 == 0 for x in (*scales, bits, hidden_in)])
        _VARIANTS.launch(hopper_fwd_kernel, form.grid, (*form.key, aligned), args, form.constants, num_warps=4)
    return out, lse
