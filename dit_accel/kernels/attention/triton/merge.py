"""Attention to parts of the keys put together in one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...common.launch import ceil_div, padded_head_dim, token_strides, unit_stride

_ROWS = 32


@triton.jit(do_not_specialize=("heads", "length"))
def merge_kernel(
    into_ptr,
    out_ptr,
    lse_ptr,
    part_ptr,
    part_lse_ptr,
    stride_ib,
    stride_is,
    stride_ih,
    stride_ob,
    stride_os,
    stride_oh,
    stride_pb,
    stride_ps,
    stride_ph,
    heads,
    length,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """``into``, which may be ``out``, and ``lse`` of both sets of keys, from those of one and of the other."""
    plane = tl.program_id(1).to(tl.int64)
    batch, head = plane // heads, plane % heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    inside = row < length
    live = inside[:, None] & (offs_d < HEAD_DIM)
    at = plane * length + row
    lse = tl.load(lse_ptr + at, mask=inside, other=float("-inf"))
    part_lse = tl.load(part_lse_ptr + at, mask=inside, other=float("-inf"))
    # NaN is the larger one, so that it shows in what comes out.
    top = tl.maximum(lse, part_lse, propagate_nan=tl.PropagateNan.ALL)
    base = tl.where(top == float("-inf"), 0.0, top)
    keep, take = tl.exp(lse - base), tl.exp(part_lse - base)
    total = keep + take
    scale = tl.where(total == 0.0, 1.0, total)
    wide = row.to(tl.int64)[:, None]
    out = tl.load(out_ptr + batch * stride_ob + head * stride_oh + wide * stride_os + offs_d, mask=live, other=0.0)
    part = tl.load(part_ptr + batch * stride_pb + head * stride_ph + wide * stride_ps + offs_d, mask=live, other=0.0)
    keep, take = (keep / scale)[:, None], (take / scale)[:, None]
    # A NaN of a part whose weight is 0 must not come through.
    kept = tl.where(keep == 0.0, 0.0, out.to(tl.float32) * keep)
    taken = tl.where(take == 0.0, 0.0, part.to(tl.float32) * take)
    into_ptrs = into_ptr + batch * stride_ib + head * stride_ih + wide * stride_is + offs_d
    tl.store(into_ptrs, (kept + taken).to(into_ptr.dtype.element_ty), mask=live)
    tl.store(lse_ptr + at, base + tl.log(total), mask=inside)


def merge_triton(
    out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`dit_accel.kernels.attention.merge.merge_attention`; ``lse`` is float32."""
    batch, length, heads, dim = out.shape
    out, part, lse = unit_stride(out), unit_stride(part), lse.contiguous()
    into = out if out.dtype == dtype else out.new_empty(out.shape, dtype=dtype)
    merge_kernel[(ceil_div(length, _ROWS), batch * heads)](
        into,
        out,
        lse,
        part,
        part_lse.contiguous(),
        *token_strides(into, out, part),
        heads,
        length,
        ROWS=_ROWS,
        BLOCK_D=padded_head_dim(dim),
        HEAD_DIM=dim,
        num_warps=4,
    )
    return into, lse
