"""flash-attn-4's block-sparse forward as a backend, for those who have it installed (extra ``fa4``).

Only the forward is its own. Gradients come from our Triton backward, which takes any forward's output and
log-sum-exp: flash-attn-4's Hopper block-sparse backward is reported wrong at head dim 64, needs lists of its
own for a deterministic sum, and is never called here.
"""

from __future__ import annotations

from typing import Any

import torch

from ..mask.block_mask import BlockMask
from .op import block_sparse_bwd


def block_lists(
    counts: torch.Tensor, indices: torch.Tensor, fulls: torch.Tensor, block_k: int, kv_len: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(masked counts, masked ids, full counts, full ids)`` as flash-attn-4 reads them, int32.

    Its lists of masked and of full blocks are separate, and of each it clips to ``kv_len`` the last entry
    only. So a short last key block must be the last of the masked list, wherever a BlockMask has it among its
    partial entries; without one nothing needs masking, and every entry may be listed as full.
    """
    if kv_len % block_k == 0:
        nothing = torch.zeros_like(counts)
        return nothing, indices[..., :1].contiguous(), counts.contiguous(), indices.contiguous()
    width = indices.shape[-1]
    position = torch.arange(width, device=indices.device)
    masked = counts - fulls
    ids = indices.gather(-1, (fulls[..., None] + position).clamp_max(width - 1).long())
    short = -(-kv_len // block_k) - 1
    # Swap the short block with the last entry of the masked list.
    is_short = (ids == short) & (position < masked[..., None])
    last = (masked[..., None] - 1).clamp_min(0)
    ids = torch.where(is_short, ids.gather(-1, last.long()), ids)
    ids = torch.where((position == last) & is_short.any(-1, keepdim=True), short, ids)
    return masked.contiguous(), ids.to(torch.int32).contiguous(), fulls.contiguous(), indices.contiguous()


@torch.library.custom_op("dit_accel::fa4_fwd", mutates_args=())
def fa4_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    counts: torch.Tensor,
    indices: torch.Tensor,
    fulls: torch.Tensor,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``out [B, Sq, H, D]`` and ``lse [B, H, Sq]``; the lists are those of a BlockMask."""
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    masked_counts, masked_ids, full_counts, full_ids = block_lists(counts, indices, fulls, block_k, k.shape[1])
    blocks = BlockSparseTensorsTorch(
        mask_block_cnt=masked_counts,
        mask_block_idx=masked_ids,
        full_block_cnt=full_counts,
        full_block_idx=full_ids,
        block_size=(block_q, block_k),
    )
    out, lse = flash_attn_func(q, k, v, softmax_scale=scale, block_sparse_tensors=blocks, return_lse=True)
    return out, lse


@fa4_fwd.register_fake
def _(q: torch.Tensor, *_rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch, q_len, heads, dim = q.shape
    return q.new_empty((batch, q_len, heads, dim)), q.new_empty((batch, heads, q_len), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, block_q, block_k, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.constants = (block_q, block_k, scale)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    *inputs, out, lse = ctx.saved_tensors
    if grad is None and grad_lse is None:
        return (None,) * 9
    grad = torch.zeros_like(out) if grad is None else grad
    unused = (None,) * 4  # no token bits, no permutation, no key mask
    dq, dk, dv = block_sparse_bwd(*inputs, *unused, *ctx.constants, out, lse, grad, grad_lse)
    return dq, dk, dv, *(None,) * 6


fa4_fwd.register_autograd(_backward, setup_context=_setup_context)


def fa4_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask, *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``out`` and ``lse`` of a call that :func:`~dit_accel.kernels.common.capability.why_not_fa4` takes."""
    return fa4_fwd(q, k, v, mask.kv_num_blocks, mask.kv_indices, mask.kv_num_full, mask.block_q, mask.block_k, scale)
