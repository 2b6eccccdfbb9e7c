"""Triton block-sparse attention backward: dQ over the key lists, dK and dV over the transposed lists.

Every gradient tile is summed by one program in list order, without atomics, so results are bit-identical
from run to run.
"""

from __future__ import annotations

import torch

from ...common.launch import (
    DOT_PRECISION,
    ceil_div,
    int32_rows,
    list_strides,
    mask_constants,
    mask_tensors,
    or_stand_in,
    padded_head_dim,
    token_strides,
    unit_stride,
)
from ...mask.block_mask import BlockMask
from ...mask.transpose import TransposedMask, transpose_mask
from ..launch_configs import LaunchConfig
from ..tuning import launch_config
from .backward_kernels import block_sparse_bwd_dkv_kernel, block_sparse_bwd_dq_kernel, delta_bwd_kernel
from .reorder import reorder_for_backward


def _delta(out: torch.Tensor, grad: torch.Tensor, grad_lse: torch.Tensor) -> torch.Tensor:
    batch, q_len, heads, dim = out.shape
    delta = torch.empty((batch, heads, q_len), dtype=torch.float32, device=out.device)
    delta_bwd_kernel[(ceil_div(q_len, 64), batch * heads)](
        out,
        grad,
        grad_lse,
        delta,
        *token_strides(out, grad),
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
    rows = int32_rows(rows)
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse.contiguous()
    if rows is None:
        delta = _delta(out, grad, grad_lse)
    else:
        # One pass at memory speed; gathering in both kernels cost a quarter of the backward on an H200.
        q, k, v, grad, lse, delta = reorder_for_backward(q, k, v, grad, out, lse, grad_lse, rows)
    shared = {
        "BLOCK_D": padded_head_dim(dim),
        "HEAD_DIM": dim,
        "PRECISION": DOT_PRECISION,
        **mask_constants(mask, rows, key_mask),
    }
    lists = mask_tensors(mask, rows, key_mask)
    strides = token_strides(q, k, v, grad)

    config = config_dq or launch_config("backward_dq", q, mask, False)
    tile_q, tile_k = config.tiles(mask, "backward_dq")
    block_sparse_bwd_dq_kernel[(nq * (mask.block_q // tile_q), batch * heads)](
        q,
        k,
        v,
        grad,
        lse,
        delta,
        dq,
        *lists,
        *strides,
        *token_strides(dq),
        *list_strides(mask.kv_indices, nq),
        *list_strides(rows, q_len),
        heads,
        mask.kv_indices.shape[-1],
        q_len,
        kv_len,
        scale,
        TILE_Q=tile_q,
        TILE_K=tile_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **shared,
    )

    transposed = transposed or transpose_mask(mask)
    index = transposed.q_indices
    config = config_dkv or launch_config("backward_dkv", q, mask, False)
    tile_q, tile_k = config.tiles(mask, "backward_dkv")
    block_sparse_bwd_dkv_kernel[(nk * (mask.block_k // tile_k), batch * heads)](
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
        or_stand_in(transposed.q_bits, index),
        *lists[4:],
        *strides,
        *token_strides(dk),
        *list_strides(index, nk),
        *list_strides(rows, q_len),
        heads,
        index.shape[-1],
        q_len,
        kv_len,
        scale,
        TILE_Q=tile_q,
        TILE_K=tile_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **shared,
    )
    return dq, dk, dv
