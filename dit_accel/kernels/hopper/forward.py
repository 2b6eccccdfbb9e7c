"""Launch of the Hopper kernel: which calls it can run, and the call, half precision in place or quantised."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..block_mask import BlockMask
from ..capability import compute_capability, multiprocessors
from ..portable.forward import LOG2_E, mask_strides
from ..quantize import QuantizedInputs
from ..reorder import heads_at_once, reorder_pair
from .kernel import hopper_fwd_kernel

_ROWS = 64  # query rows of a consumer warpgroup
_SHARED_BYTES = 224 << 10  # of 227 KiB: barriers and alignment take a little
# What a permuted copy of keys and values may take where they are not gathered, as a share of the bytes of q, k, v and
# the output: a few heads are moved and attended at a time, through one buffer. Each part ends with multiprocessors that
# run out of tiles, so that a part of few tiles would cost more than the copy is worth: then all heads of a batch entry
# are moved at once.
COPY_SHARE = 0.15
_TILES_OF_A_PART = 8  # for each multiprocessor, at least


@dataclass(frozen=True)
class HopperConfig:
    """Buffers of key and value blocks, and whether the consumers take turns at products.

    ``biased``: start the integer sums of INT8 products at the bits of a float, in place of converting them.
    ``gather``: read keys and values of a permuted call row by row, where that can be, in place of copying them first.
    ``copy_share``: a share to keep to whatever it costs, in place of :data:`COPY_SHARE`.
    """

    stages: int
    take_turns: bool
    biased: bool = False
    gather: bool = False
    copy_share: float | None = None


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
    if x.stride(-1) != 1 or (by_head and x.stride(2) != x.shape[3]):
        return "does not have its heads side by side"
    if x.data_ptr() % 16 or any((x.stride(n) * 2) % 16 for n in range(3)):
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
    if mask.block_q != 128 or mask.block_k not in (64, 128):
        return f"it takes blocks of 128x64 and 128x128, got {mask.block_q}x{mask.block_k}"
    return None


def default_config(block_k: int, dim: int, precision: str | None, permuted: bool = False) -> HopperConfig:
    """The fastest that was measured at head dim 128, and buffers that fit shared memory elsewhere.

    ``precision`` is None for half-precision inputs.
    """
    half = 2 * dim
    in_row = half if precision is None else dim
    value_row = dim if precision == "int8_fp8" else half
    out = 0 if precision is None else 128 * half
    stages = (_SHARED_BYTES - 2 * 128 * in_row - out) // (block_k * (in_row + value_row))
    most = (3 if precision == "int8" else 4) * 128 // block_k
    gather = precision is None and block_k == 64
    return HopperConfig(
        min(most, stages),
        take_turns=permuted if gather else precision is not None and block_k == 128,
        biased=precision is not None and (precision, block_k) != ("int8_fp8", 128),
        gather=gather,
    )


def _can_gather(k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether rows of k and v lie alike, at 32-bit distances."""
    return k.stride(1) == v.stride(1) and k.shape[1] * k.stride(1) < 2**31


def heads_of_a_copy(batch: int, heads: int, query_blocks: int, programs: int, share: float | None = None) -> int:
    """Heads whose keys and values a permuted call moves at a time; ``share`` as in :class:`HopperConfig`."""
    if share is not None:
        return heads_at_once(batch, heads, share)
    part = heads_at_once(batch, heads, COPY_SHARE)
    return part if part * query_blocks >= _TILES_OF_A_PART * programs else heads


def _tiles(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Tiles ``[rows, columns]`` of a matrix; what lies past its last row reads as zero and is not written."""
    layout = _shared_layout(x.element_size(), columns)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], layout)


@cache
def _shared_layout(element_bytes: int, columns: int) -> gl.NVMMASharedLayout:
    swizzle = min(128, columns * element_bytes)
    return gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=8 * element_bytes, rank=2)


def _side_by_side(x: torch.Tensor) -> torch.Tensor:
    """``[S, H, D]`` with adjacent heads as the matrix ``[S, H * D]``."""
    length, heads, dim = x.shape
    return x.as_strided((length, heads * dim), (x.stride(0), 1))


def _heads_from(x: torch.Tensor, first: int, dim: int = 0) -> torch.Tensor:
    """``x`` from a head on; where it has one head, that one stands for all."""
    return x if first == 0 or x.shape[dim] == 1 else x.narrow(dim, first, x.shape[dim] - first)


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """``out [B, Sq, H, D]`` and ``lse [B, H, Sq]`` of a call for which ``why_not_hopper`` found nothing.

    With ``quantized``, made from the same q, k, v and rows, the numbers come from there; q, k and v then only
    give shapes and the output dtype.
    """
    batch, q_len, heads, dim = q.shape
    kv_len = k.shape[1]
    out = torch.empty((batch, q_len, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=q.device)
    nq, nk = mask.num_blocks
    if rows is not None:
        rows = rows.to(torch.int32).contiguous()
    fp8 = quantized is not None and quantized.v_scale is not None
    precision = None if quantized is None else "int8_fp8" if fp8 else "int8"
    values = quantized.v if precision == "int8" and _why_not_tiles(quantized.v) is None else None
    if precision == "int8" and values is None:
        values = quantized.v.contiguous()
    config = config or default_config(mask.block_k, dim, precision, rows is not None)
    programs = multiprocessors(q.device.index or 0)
    together, copy = heads, None
    gathered = rows is not None and quantized is None and config.gather and _can_gather(k, v)
    if rows is not None and quantized is None and not gathered:
        together = heads_of_a_copy(batch, heads, nq, programs, config.copy_share)
        copy = torch.empty((2, 1, kv_len, together, dim), dtype=k.dtype, device=k.device)
    counts, fulls, index = (x.contiguous() for x in (mask.kv_num_blocks, mask.kv_num_full, mask.kv_indices))
    bit_rows = index if mask.kv_bits is None else mask.kv_bits.contiguous()
    bits = index if mask.token_bits is None else mask.token_bits.contiguous()
    hidden = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    rows_head_stride = 0 if rows is None else mask_strides(rows, q_len)[1]
    # Tiles that were taken beyond the first of each program, a count for each launch.
    launches = list(itertools.product(range(batch), range(0, heads, together)))
    taken = torch.zeros(len(launches), dtype=torch.int32, device=q.device)
    for launch, (b, first) in enumerate(launches):
        mb = b if counts.shape[0] > 1 else 0
        rb = b if rows is not None and rows.shape[0] > 1 else 0
        count = min(together, heads - first)
        if quantized is None:
            q_in, k_in, v_in = q[b], k[b], v[b]
            if copy is not None:
                part = copy if count == together else copy.flatten()[: 2 * kv_len * count * dim]
                part = part.view(2, 1, kv_len, count, dim)
                reorder_pair(k[b : b + 1], v[b : b + 1], rows[rb : rb + 1], first=first, out=part)
                k_in, v_in = part[0, 0], part[1, 0]
            keys = (k[b], v[b])
            k_in, v_in = _side_by_side(k_in), _side_by_side(v_in)
            q_tiles = _tiles(_side_by_side(q_in) if rows is None else k_in, _ROWS, dim)
            scales = (lse, lse, lse, lse)
            planes = (0, 0, dim)
        else:
            q_in = quantized.q[b]
            k_in = quantized.k[b].flatten(0, 1)
            v_in = quantized.v[b].flatten(0, 1) if fp8 else _side_by_side(values[b])
            q_tiles = _tiles(q_in.flatten(0, 1), _ROWS, dim)
            keys = (q_in, q_in)
            v_scale = lse if quantized.v_scale is None else quantized.v_scale[b]
            scales = (quantized.q_scale[b], quantized.k_scale[b], v_scale, quantized.q_shift[b])
            planes = (nq * mask.block_q, nk * mask.block_k, 0)
        v_tile = (dim, mask.block_k) if fp8 else (mask.block_k, dim)
        hopper_fwd_kernel[(min(nq * count, programs),)](
            q_tiles,
            _tiles(k_in, mask.block_k, dim),
            _tiles(v_in, *v_tile),
            _tiles(_side_by_side(out[b]), _ROWS, dim),
            _heads_from(q_in, first, 1),
            *keys,
            _heads_from(out[b], first, 1),
            _heads_from(lse[b], first),
            *scales,
            _heads_from(counts[mb], first),
            _heads_from(fulls[mb], first),
            _heads_from(index[mb], first),
            _heads_from(bit_rows[mb], first),
            bits,
            index if rows is None else _heads_from(rows[rb], first),
            index if hidden is None else hidden[b],
            taken[launch],
            *q.stride()[1:3],
            *k.stride()[1:3],
            v.stride(2),
            *out.stride()[1:3],
            rows_head_stride,
            nq,
            nq * count,
            mask_strides(index, nq)[1],
            index.shape[-1],
            *planes,
            q_len,
            kv_len,
            scale * LOG2_E,
            BLOCK_K=mask.block_k,
            HEAD_DIM=dim,
            STAGES=config.stages,
            PERMUTED=rows is not None,
            GATHER_KV=gathered,
            HAS_BITS=mask.kv_bits is not None and mask.token_bits.shape[0] > 0,
            HAS_KEY_MASK=key_mask is not None,
            TAKE_TURNS=config.take_turns,
            QUANTIZED=quantized is not None,
            FP8=fp8,
            THREAD_SCALES=quantized is not None and quantized.scales_by_thread,
            BIASED=quantized is not None and config.biased,
            num_warps=4,
        )
    return out, lse
