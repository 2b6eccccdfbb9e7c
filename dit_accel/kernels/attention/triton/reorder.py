"""What the backward of a permuted call reads, in permuted order, written in one pass at memory speed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...common.launch import SIZES, ceil_div, list_strides, padded_head_dim, token_strides


@triton.jit(do_not_specialize=SIZES)
def reorder_for_backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    out_ptr,
    lse_ptr,
    grad_lse_ptr,
    q_to_ptr,
    k_to_ptr,
    v_to_ptr,
    grad_to_ptr,
    lse_to_ptr,
    delta_ptr,
    rows_ptr,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_gb,
    stride_gs,
    stride_gh,
    stride_ob,
    stride_os,
    stride_oh,
    rows_batch_stride,
    rows_head_stride,
    heads,
    length,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    plane = tl.program_id(1).to(tl.int64)
    batch, head = plane // heads, plane % heads
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    inside = slot < length
    live = inside[:, None] & (offs_d < HEAD_DIM)[None, :]
    rows_ptr += batch * rows_batch_stride + head * rows_head_stride
    row = tl.load(rows_ptr + slot, mask=inside, other=0).to(tl.int64)
    wide, offs = row[:, None], offs_d[None, :]
    q = tl.load(q_ptr + batch * stride_qb + head * stride_qh + wide * stride_qs + offs, mask=live)
    k = tl.load(k_ptr + batch * stride_kb + head * stride_kh + wide * stride_ks + offs, mask=live)
    v = tl.load(v_ptr + batch * stride_vb + head * stride_vh + wide * stride_vs + offs, mask=live)
    grad = tl.load(grad_ptr + batch * stride_gb + head * stride_gh + wide * stride_gs + offs, mask=live, other=0.0)
    out = tl.load(out_ptr + batch * stride_ob + head * stride_oh + wide * stride_os + offs, mask=live, other=0.0)
    to = ((batch * length + slot)[:, None] * heads + head) * HEAD_DIM + offs
    tl.store(q_to_ptr + to, q, mask=live)
    tl.store(k_to_ptr + to, k, mask=live)
    tl.store(v_to_ptr + to, v, mask=live)
    tl.store(grad_to_ptr + to, grad, mask=live)
    at = plane * length
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    delta -= tl.load(grad_lse_ptr + at + row, mask=inside, other=0.0)
    tl.store(delta_ptr + at + slot, delta, mask=inside)
    tl.store(lse_to_ptr + at + slot, tl.load(lse_ptr + at + row, mask=inside, other=0.0), mask=inside)


def reorder_for_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_lse: torch.Tensor,
    rows: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """q, k, v and the output's gradient ``[B, S, H, D]``, lse and delta ``[B, H, S]``, in permuted order.

    ``delta = rowsum(dO * O) - dLSE``. Inputs have a last dimension of stride 1; rows int32 ``[B|1, H|1, S]``.
    """
    batch, length, heads, dim = q.shape
    moved = [torch.empty((batch, length, heads, dim), dtype=q.dtype, device=q.device) for _ in range(4)]
    lse_to, delta = (torch.empty((batch, heads, length), dtype=torch.float32, device=q.device) for _ in range(2))
    block = 32
    reorder_for_backward_kernel[(ceil_div(length, block), batch * heads)](
        q,
        k,
        v,
        grad,
        out,
        lse,
        grad_lse,
        *moved,
        lse_to,
        delta,
        rows,
        *token_strides(q, k, v, grad, out),
        *list_strides(rows, length),
        heads,
        length,
        BLOCK=block,
        BLOCK_D=padded_head_dim(dim),
        HEAD_DIM=dim,
        num_warps=4,
    )
    return (*moved, lse_to, delta)
