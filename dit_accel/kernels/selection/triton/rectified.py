"""Triton epilogue of rectified attention: scale a block of output rows and add one vector to each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...common.compiled import KeptKernel
from ...common.launch import ceil_div, contiguous_rows, lead_strides, or_stand_in, power_of_two
from ...common.primitives import slot_rows


@triton.jit
def blend_blocks_kernel(
    out_ptr,
    share_ptr,
    extra_ptr,
    rows_ptr,
    seq,
    heads,
    tiles,
    blocks,
    stride_ob,
    stride_os,
    stride_oh,
    stride_od,
    stride_rb,
    stride_rh,
    HAS_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    pid = tl.program_id(0)
    h = pid % heads
    t = (pid // heads) % tiles
    b = pid // (heads * tiles)
    o_d = tl.arange(0, DIM_PAD)
    in_d = o_d < DIM
    slot = t * TILE + tl.arange(0, TILE)
    valid = slot < seq
    row = slot_rows(rows_ptr + b * stride_rb + h * stride_rh, slot, valid, HAS_ROWS)
    block = ((b.to(tl.int64) * heads + h) * blocks + slot // BLOCK)[:, None]
    ok = valid[:, None] & in_d[None, :]
    o_out = b.to(tl.int64) * stride_ob + h.to(tl.int64) * stride_oh
    p_out = out_ptr + o_out + row.to(tl.int64)[:, None] * stride_os + o_d[None, :] * stride_od
    share = tl.load(share_ptr + block, mask=valid[:, None], other=0.0)
    extra = tl.load(extra_ptr + block * DIM + o_d[None, :], mask=ok, other=0.0)
    b_out = tl.load(p_out, mask=ok, other=0.0).to(tl.float32) * share + extra
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=ok)


_BLEND = KeptKernel(blend_blocks_kernel)


def blend_blocks_triton(
    out: torch.Tensor, share: torch.Tensor, extra: torch.Tensor, block: int, rows: torch.Tensor | None
) -> torch.Tensor:
    """``out = share * out + extra`` in place, with ``[B, H, n]`` and ``[B, H, n, D]`` by block."""
    batch, seq, heads, dim = out.shape
    tile = 32
    tiles = ceil_div(seq, tile)
    share, extra, rows = share.contiguous(), extra.contiguous(), contiguous_rows(rows)
    with torch.cuda.device_of(out):
        _BLEND[(batch * heads * tiles,)](
            out,
            share,
            extra,
            or_stand_in(rows, out),
            seq,
            heads,
            tiles,
            share.shape[-1],
            *out.stride(),
            *lead_strides(rows),
            HAS_ROWS=rows is not None,
            BLOCK=block,
            TILE=tile,
            DIM=dim,
            DIM_PAD=power_of_two(dim),
            num_warps=2,
        )
    return out
