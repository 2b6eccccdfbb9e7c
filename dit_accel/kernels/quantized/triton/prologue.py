"""The quantising prologue: q, k and v read once, permuted, smoothed, quantised and averaged per block.

Two launches: sums of sampled tiles of k (and maxima of v for FP8) in chunks, then all blocks of q, of k and, where v
is rewritten at all, of v. The second adds up the chunks by itself, so that nothing small runs between the two.
"""

from __future__ import annotations

import itertools
import math
from functools import cache

import torch

from ...common.capability import multiprocessors, sums_twice_as_fast_in_half
from ...common.compiled import KeptKernel
from ...common.launch import (
    ceil_div,
    int32_rows,
    list_strides,
    padded_head_dim,
    power_of_two,
    register_limit,
    token_strides,
    unit_stride,
)
from ...common.quantized_inputs import (
    KEY_GROUPS,
    KEY_TILE,
    QuantizedInputs,
    sampled_keys,
    validate_key_scales,
    validate_rotation,
)
from .prologue_kernels import key_value_stats_kernel, quantize_kernel

_STATS, _QUANTIZE = KeptKernel(key_value_stats_kernel), KeptKernel(quantize_kernel)
_K_CHUNKS, _V_CHUNKS = 16, 32  # at most; each program adds them all up
_CHUNK_PROGRAMS = 264  # two on each of an H200's multiprocessors
_WARPS, _REGISTERS = 4, 255  # eight warps of half the registers took 11 to 28 % more time on an H200
_PROGRAMS = 2  # a multiprocessor at a time, as the registers allow: one waits or stores while the other computes
_STAGES = 3  # blocks a program has in work or on their way; those on their way fill at most so many bytes:
_BUFFER_BYTES = 65536


def _slots(device: torch.device) -> int:
    """Programs that a device runs at a time; in the interpreter few, so that they have several blocks."""
    if device.type != "cuda":
        return 4
    return _PROGRAMS * multiprocessors(device.index or 0)


def _stages(tile_bytes: int) -> int:
    """Stages of a loop over tiles; with one, the compiler does not load ahead."""
    return max(1, min(_STAGES, 1 + _BUFFER_BYTES // tile_bytes))


@cache
def _shares(blocks: int, planes: int, slots: int) -> int:
    """Among how many programs to split the blocks of each plane.

    Programs run in rounds of ``slots``; a round takes as long as a program's blocks, and one more to begin.
    """
    return min(range(1, min(blocks, 64) + 1), key=lambda n: -(-n * planes // slots) * (-(-blocks // n) + 1))


def _carve(batch: int, heads: int, shapes: list[tuple[int, ...]], device: torch.device) -> list[torch.Tensor]:
    """Contiguous float32 tensors ``[B, H, *shape]`` in one allocation, each aligned to 16 bytes."""
    sizes = [batch * heads * math.prod(shape) for shape in shapes]
    starts = [0, *itertools.accumulate(-(-size // 4) * 4 for size in sizes)]
    whole = torch.empty(starts[-1], dtype=torch.float32, device=device)
    pieces = []
    for shape, start in zip(shapes, starts, strict=False):
        full = (batch, heads, *shape)
        strides = [math.prod(full[n + 1 :]) for n in range(len(full))]
        pieces.append(whole.as_strided(full, strides, start))
    return pieces


def quantize_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_q: int,
    block_k: int,
    *,
    precision: str = "int8",
    rows: torch.Tensor | None = None,
    smooth_k: bool = True,
    smooth_q: bool = False,
    key_scales: str = "block",
    rotate: bool = False,
    half_sums: bool | None = None,
) -> QuantizedInputs:
    """Quantise ``[B, S, H, D]`` inputs for :func:`quantized_block_sparse_attention`.

    One pass over some of k (and all of v for FP8) for the mean key and the value scales, then one over q, k and v;
    v is left where it is when it stays in its dtype and order.

    Args:
        block_q, block_k: block sizes of the mask, powers of two.
        precision: ``"int8"`` or ``"int8_fp8"``.
        rows: optional permutation ``[B or 1, H or 1, S]`` applied while writing.
        smooth_k: subtract the mean key.
        smooth_q: subtract the mean of each query block.
        key_scales: ``"block"`` or ``"thread"``, see :mod:`~dit_accel.kernels.common.quantized_inputs`.
        rotate: turn queries and keys by a Hadamard matrix, which spreads channels that stand out over all.
        half_sums: whether weights and values are to be summed in float16; if None, where the GPU is faster at that.
    """
    validate_key_scales(key_scales, block_k)
    validate_rotation(rotate, smooth_q, q.shape[-1])
    if precision not in ("int8", "int8_fp8"):
        raise ValueError(f"precision must be int8 or int8_fp8 for the kernels, got {precision!r}.")
    batch, q_len, heads, dim = q.shape
    kv_len = k.shape[1]
    device = q.device
    fp8 = precision == "int8_fp8"
    if half_sums is None:
        half_sums = not fp8 and q.is_cuda and sums_twice_as_fast_in_half(device.index or 0)
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    nq, nk = -(-q_len // block_q), -(-kv_len // block_k)
    block_d = padded_head_dim(dim)
    planes = batch * heads

    def make(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty((batch, heads, *shape), dtype=dtype, device=device)

    k_step, sampled = sampled_keys(kv_len)
    tiles, wanted = ceil_div(kv_len, KEY_TILE), max(1, _CHUNK_PROGRAMS // planes)
    k_chunks = min(_K_CHUNKS, ceil_div(tiles, k_step), wanted)
    v_chunks = min(_V_CHUNKS, tiles, wanted) if fp8 else 0
    groups = (KEY_GROUPS,) if key_scales == "thread" else ()
    shapes = [(nq * block_q,), (nk, *groups), (nq, dim), (nk, dim), (nq * block_q,), (k_chunks, dim)]
    shapes += [(v_chunks, dim), (dim,)] if fp8 else []
    q_scale, k_scale, q_mean, k_mean, q_shift, k_sum, *of_v = _carve(batch, heads, shapes, device)
    v_max, v_scale = of_v if fp8 else (k_sum, None)
    if smooth_k or fp8:
        _STATS[(max(k_chunks, v_chunks), planes, 2 if fp8 else 1)](
            k,
            v,
            k_sum,
            v_max,
            *token_strides(k, v),
            heads,
            kv_len,
            k_chunks,
            v_chunks,
            k_step,
            TILE=KEY_TILE,
            BLOCK_D=block_d,
            HEAD_DIM=dim,
            STAGES=_stages(KEY_TILE * block_d * k.element_size()),
            num_warps=8,
        )
    value = v
    if fp8:
        value = make(dim, nk * block_k, dtype=torch.float8_e4m3fn)
    elif rows is not None or (half_sums and v.dtype != torch.float16):
        dtype = torch.float16 if half_sums else v.dtype
        value = torch.empty((batch, kv_len, heads, dim), dtype=dtype, device=device)
    result = QuantizedInputs(
        q=make(nq * block_q, dim, dtype=torch.int8),
        q_scale=q_scale,
        k=make(nk * block_k, dim, dtype=torch.int8),
        k_scale=k_scale,
        v=value,
        v_scale=v_scale,
        q_mean=q_mean,
        k_mean=k_mean,
        q_shift=q_shift,
        smooth_q=smooth_q,
        half_sums=half_sums,
    )
    rows = int32_rows(rows)
    rewrite = value is not v
    kinds = 3 if rewrite else 2
    # Turned tiles go through shared memory, beside the matrix: nothing is loaded ahead of them.
    stages = 1 if rotate else _stages(max(block_q, block_k) * block_d * q.element_size())
    _QUANTIZE[(_shares(max(nq, nk), planes * kinds, _slots(device)), planes, kinds)](
        q,
        k,
        v,
        k_sum if rows is None else rows,
        k_sum,
        v_max,
        result.q,
        result.q_scale,
        result.q_mean,
        result.q_shift,
        result.k,
        result.k_scale,
        result.k_mean,
        value,
        k_sum if v_scale is None else v_scale,
        *token_strides(q, k, v),
        *list_strides(rows, q_len),
        heads,
        q_len,
        kv_len,
        nq,
        nk,
        k_chunks,
        v_chunks,
        sampled,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        BLOCK_D=block_d,
        HEAD_DIM=dim,
        K_CHUNKS=max(2, power_of_two(k_chunks)),
        V_CHUNKS=max(2, power_of_two(v_chunks)),
        PERMUTED=rows is not None,
        SMOOTH_K=smooth_k,
        SMOOTH_Q=smooth_q,
        FP8=fp8,
        REWRITE=rewrite,
        THREAD_SCALES=key_scales == "thread",
        ROTATE=rotate,
        STAGES=stages,
        num_warps=_WARPS if block_d <= 128 else 2 * _WARPS,
        **register_limit(_REGISTERS),
    )
    return result
