"""Pairs of columns turned by a token's angles: a program has the angles of some tokens, and all their heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.compiled import KeptKernel
from ..common.launch import ceil_div, padded_head_dim, token_strides, unit_stride

TILE = 16
"""Tokens of a program."""


@triton.jit
def turn(
    x_ptr, out_ptr, stride_h, heads, c, s, live, TILE: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """All heads of some tokens; heads of the output are adjacent."""
    for _ in range(0, heads):
        x = tl.load(x_ptr, mask=live, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, (TILE, BLOCK_D // 2, 2)))
        turned = tl.reshape(tl.join(first * c - second * s, first * s + second * c), (TILE, BLOCK_D))
        tl.store(out_ptr, turned.to(out_ptr.dtype.element_ty), mask=live)
        x_ptr += stride_h
        out_ptr += HEAD_DIM


@triton.jit(do_not_specialize=("tokens", "q_heads", "k_heads"))
def rotate_pairs_fwd_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_cb,
    stride_cs,
    stride_sb,
    stride_ss,
    tokens,
    q_heads,
    k_heads,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """``TILE`` tokens of a sequence."""
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    wide = token.to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    live = (token < tokens)[:, None] & (column < HEAD_DIM)
    cos = tl.load(cos_ptr + batch * stride_cb + wide * stride_cs + column, mask=live, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + batch * stride_sb + wide * stride_ss + column, mask=live, other=0.0).to(tl.float32)
    c, _ = tl.split(tl.reshape(cos, (TILE, BLOCK_D // 2, 2)))
    _, s = tl.split(tl.reshape(sin, (TILE, BLOCK_D // 2, 2)))
    at = (batch * tokens + wide) * HEAD_DIM
    turn(
        q_ptr + batch * stride_qb + wide * stride_qs + column, q_out_ptr + at * q_heads + column, stride_qh, q_heads,
        c, s, live, TILE, BLOCK_D, HEAD_DIM,
    )  # fmt: skip
    turn(
        k_ptr + batch * stride_kb + wide * stride_ks + column, k_out_ptr + at * k_heads + column, stride_kh, k_heads,
        c, s, live, TILE, BLOCK_D, HEAD_DIM,
    )  # fmt: skip


_KERNEL = KeptKernel(rotate_pairs_fwd_kernel)


def rotate_pairs_triton(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`dit_accel.kernels.rotary.api.rotate_pairs`."""
    batch, tokens, _, dim = q.shape
    q, k, cos, sin = (unit_stride(x) for x in (q, k, cos, sin))
    q_out, k_out = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    angles = [0 if x.shape[0] == 1 and place == 0 else x.stride(place) for x in (cos, sin) for place in (0, 1)]
    with torch.cuda.device_of(q):
        _KERNEL[(ceil_div(tokens, TILE), batch)](
            q,
            k,
            cos,
            sin,
            q_out,
            k_out,
            *token_strides(q, k),
            *angles,
            tokens,
            q.shape[2],
            k.shape[2],
            TILE=TILE,
            BLOCK_D=padded_head_dim(dim),
            HEAD_DIM=dim,
            num_warps=4,
        )
    return q_out, k_out
