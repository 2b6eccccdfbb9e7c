"""Triton block-sparse attention backward: dQ over the key lists, dK and dV over the transposed lists.

Every gradient tile is summed by one program in list order, without atomics, so results are bit-identical
from run to run.
"""

from __future__ import annotations

import torch
import triton

from ...mask.block_mask import BlockMask
from ...mask.transpose import TransposedMask, transpose_mask
from ..tuning import LaunchConfig, launch_config
from .backward_kernels import block_sparse_bwd_dkv_kernel, block_sparse_bwd_dq_kernel, delta_bwd_kernel
from .forward import dot_precision, mask_strides, padded_head_dim, unit_stride
from .reorder import reorder_for_backward

# Rows or columns of the other side taken at once; smaller than a block, to fit two score tiles in registers.
_TILE = 64


def _delta(out: torch.Tensor, grad: torch.Tensor, grad_lse: torch.Tensor) -> torch.Tensor:
    batch, q_len, heads, dim = out.shape
    delta = torch.empty((batch, heads, q_len), dtype=torch.float32, device=out.device)
    delta_bwd_kernel[(triton.cdiv(q_len, 64), batch * heads)](
        out,
        grad,
        grad_lse,
        delta,
        *out.stride()[:3],
        *grad.stride()[:3],
        heads,
        q_len,
        BLOCK=64,
        BLOCK_D=padded_head_dim(dim),
        HEAD_DIM=dim,
        num_warps=4,
    )
    return delta


def backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    *,
    transposed: TransposedMask | None = None,
    config_dq: LaunchConfig | None = None,
    config_dkv: LaunchConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v from those of ``out [B, Sq, H, D]`` and, if given, ``lse [B, H, Sq]``."""
    batch, q_len, heads, dim = q.shape
    kv_len = k.shape[1]
    q, k, v, grad, out = (unit_stride(x) for x in (q, k, v, grad, out))
    nq, nk = mask.num_blocks
    dq = torch.empty((batch, q_len, heads, dim), dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty((batch, kv_len, heads, dim), dtype=q.dtype, device=q.device) for _ in range(2))
    if rows is not None:
        rows = rows.to(torch.int32).contiguous()
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse.contiguous()
    block_d = padded_head_dim(dim)
    if rows is None:
        delta = _delta(out, grad, grad_lse)
    else:
        # One pass at memory speed; gathering in both kernels cost a quarter of the backward on an H200.
        q, k, v, grad, lse, delta = reorder_for_backward(q, k, v, grad, out, lse, grad_lse, rows)
    permuted = rows is not None
    index = mask.kv_indices.contiguous()
    shared = {
        "BLOCK_Q": mask.block_q,
        "BLOCK_K": mask.block_k,
        "BLOCK_D": block_d,
        "HEAD_DIM": dim,
        "PERMUTED": permuted,
        "HAS_BITS": mask.kv_bits is not None and mask.token_bits.shape[0] > 0,
        "HAS_KEY_MASK": key_mask is not None,
        "PRECISION": dot_precision(q.dtype),
    }
    bits = index if mask.token_bits is None else mask.token_bits.contiguous()
    hidden = index if key_mask is None else key_mask.contiguous().view(torch.uint8)
    rows_strides = mask_strides(rows, q_len) if rows is not None else (0, 0)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
    rows = index if rows is None else rows

    config = config_dq or launch_config("backward_dq", q, mask, False)
    block_sparse_bwd_dq_kernel[(nq, batch * heads)](
        q,
        k,
        v,
        grad,
        lse,
        delta,
        dq,
        mask.kv_num_blocks.contiguous(),
        mask.kv_num_full.contiguous(),
        index,
        index if mask.kv_bits is None else mask.kv_bits.contiguous(),
        bits,
        rows,
        hidden,
        *strides,
        *dq.stride()[:3],
        *mask_strides(index, nq),
        *rows_strides,
        heads,
        index.shape[-1],
        q_len,
        kv_len,
        scale,
        TILE_K=min(_TILE, mask.block_k),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **shared,
    )

    transposed = transposed or transpose_mask(mask)
    index = transposed.q_indices
    config = config_dkv or launch_config("backward_dkv", q, mask, False)
    block_sparse_bwd_dkv_kernel[(nk, batch * heads)](
        q,
        k,
        v,
        grad,
        lse,
        delta,
        dk,
        dv,
        transposed.q_num_blocks,
        transposed.q_num_full,
        index,
        index if transposed.q_bits is None else transposed.q_bits,
        bits,
        rows,
        hidden,
        *strides,
        *dk.stride()[:3],
        *mask_strides(index, nk),
        *rows_strides,
        heads,
        index.shape[-1],
        q_len,
        kv_len,
        scale,
        TILE_Q=min(_TILE, mask.block_q),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **shared,
    )
    return dq, dk, dv
