"""The Triton backend as custom operators: opaque to torch.compile, differentiable, safe to trace."""

from __future__ import annotations

from typing import Any

import torch

from ..common.zeroed import ZeroedPieces
from ..mask.block_mask import BlockMask
from .means import LeftOutMeans
from .triton.backward import backward
from .triton.forward import forward
from .variants import why_not_hopper_half, why_not_hopper_means

# Of plain calls: an operator may run in memory that a compiled graph has to itself, and must leave nothing there.
_COUNTERS = ZeroedPieces()


def _mask_of(
    counts: torch.Tensor,
    indices: torch.Tensor,
    fulls: torch.Tensor,
    bit_rows: torch.Tensor | None,
    token_bits: torch.Tensor | None,
    block_q: int,
    block_k: int,
    q_len: int,
    kv_len: int,
) -> BlockMask:
    return BlockMask(counts, indices, fulls, block_q, block_k, q_len, kv_len, bit_rows, token_bits)


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    counts: torch.Tensor,
    indices: torch.Tensor,
    fulls: torch.Tensor,
    bit_rows: torch.Tensor | None,
    token_bits: torch.Tensor | None,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``out [B, Sq, H, D]`` and ``lse [B, H, Sq]``; the lists are those of a BlockMask."""
    mask = _mask_of(counts, indices, fulls, bit_rows, token_bits, block_q, block_k, q.shape[1], k.shape[1])
    return _run(q, k, v, mask, rows, key_mask, scale)


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    scale: float,
    pieces: ZeroedPieces | None = None,
    means: LeftOutMeans | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A call by the kernel that takes it."""
    if why_not_hopper_half(q, k, v, mask, rows) is None:
        from .hopper.forward import hopper_forward

        return hopper_forward(q, k, v, mask, rows, key_mask, scale, pieces=pieces, means=means)
    assert means is None
    with torch.cuda.device_of(q):
        return forward(q, k, v, mask, rows, key_mask, scale)


block_sparse_fwd = torch.library.custom_op("dit_accel::block_sparse_fwd", _forward, mutates_args=())


@block_sparse_fwd.register_fake
def _(q: torch.Tensor, *_rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch, q_len, heads, dim = q.shape
    return q.new_empty((batch, q_len, heads, dim)), q.new_empty((batch, heads, q_len), dtype=torch.float32)


@torch.library.custom_op("dit_accel::block_sparse_bwd", mutates_args=())
def block_sparse_bwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    counts: torch.Tensor,
    indices: torch.Tensor,
    fulls: torch.Tensor,
    bit_rows: torch.Tensor | None,
    token_bits: torch.Tensor | None,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v."""
    mask = _mask_of(counts, indices, fulls, bit_rows, token_bits, block_q, block_k, q.shape[1], k.shape[1])
    with torch.cuda.device_of(q):
        return backward(q, k, v, mask, rows, key_mask, scale, out, lse, grad, grad_lse)


@block_sparse_bwd.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
        torch.empty_like(v, memory_format=torch.contiguous_format),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, block_q, block_k, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.constants = (block_q, block_k, scale)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    *inputs, out, lse = ctx.saved_tensors
    if grad is None and grad_lse is None:
        return (None,) * 13
    grad = torch.zeros_like(out) if grad is None else grad
    dq, dk, dv = block_sparse_bwd(*inputs, *ctx.constants, out, lse, grad, grad_lse)
    return dq, dk, dv, *(None,) * 10


block_sparse_fwd.register_autograd(_backward, setup_context=_setup_context)


def _is_plain(*tensors: torch.Tensor) -> bool:
    """Whether a call needs nothing of an operator, which costs the host 60 us: no graph, no gradient, no tensor that
    stands for others, no mode that looks at operators."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or any(type(x) is not torch.Tensor and not isinstance(x, torch.nn.Parameter) for x in tensors)
        or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
    )


def why_not_means(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    means: LeftOutMeans,
) -> str | None:
    """Why :func:`triton_attention` cannot take means, or None if it can: operators have no argument for them."""
    if not _is_plain(q, k, v, means.means.keys, means.means.values):
        return "gradients and traces have an operator for each step"
    return why_not_hopper_means(q, k, v, mask, rows, key_mask, means)


def triton_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    *,
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float,
    means: LeftOutMeans | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the kept blocks in Triton; differentiable in q, k, v through out and lse.

    Arguments and results are those of :func:`dit_accel.kernels.block_sparse_attention` after validation, and ``means``
    of calls for which :func:`why_not_means` found nothing are attended in the same softmax.
    """
    if _is_plain(q, k, v):
        return _run(q, k, v, mask, rows, key_mask, scale, _COUNTERS, means)
    assert means is None
    return block_sparse_fwd(
        q,
        k,
        v,
        mask.kv_num_blocks,
        mask.kv_indices,
        mask.kv_num_full,
        mask.kv_bits,
        mask.token_bits,
        rows,
        key_mask,
        mask.block_q,
        mask.block_k,
        scale,
    )
