"""Attention among block means, and its gated sum with another attention: the coarse branch of VSA.

Reference: Video Sparse Attention (arXiv 2505.13389). The work is that of pooling, a product of blocks times blocks, and
one pass over the output; it runs in torch, pooling on Triton where that runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..common.choice import Case, Choice, choose
from ..common.scale import scale_of
from ..common.tokens import gather_mask
from ..selection.api import pool_blocks


def choose_coarse(case: Case, backend: str = "auto") -> Choice:
    """Which implementation runs the coarse branch, and why.

    Raises:
        ValueError: Triton by name.
    """
    return choose("coarse", backend, case, "there is no Triton kernel for it")


def block_of_token(rows: torch.Tensor | None, length: int, block: int, device: torch.device) -> torch.Tensor:
    """int64 ``[B|1, H|1, S]``: the block in which each token lies; ``rows`` as :func:`block_means` takes them."""
    slots = torch.arange(length, device=device) // block
    if rows is None:
        return slots[None, None]
    return torch.empty_like(rows, dtype=torch.int64).scatter_(2, rows.long(), slots.expand(rows.shape))


class _BlockMeans(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        block: int,
        rows: torch.Tensor | None,
        key_mask: torch.Tensor | None,
        backend: str,
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, key_mask)
        ctx.block, ctx.like = block, (x.shape, x.dtype)
        return pool_blocks(x, block, rows=rows, key_mask=key_mask, backend=backend)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        rows, key_mask = ctx.saved_tensors
        (batch, length, heads, dim), dtype = ctx.like
        (grad,) = grads
        count = _tokens(length, ctx.block, rows, key_mask, grad.device).clamp(min=1)
        place = block_of_token(rows, length, ctx.block, grad.device).expand(batch, heads, length)
        shared = (grad / count[..., None]).gather(2, place[..., None].expand(-1, -1, -1, dim)).transpose(1, 2)
        if key_mask is not None:
            shared = shared.masked_fill(~key_mask[..., None, None], 0.0)
        return shared.to(dtype), None, None, None, None


def block_means(
    x: torch.Tensor,
    block: int,
    *,
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """:func:`~dit_accel.kernels.selection.api.pool_blocks` with a gradient: a token gets its share of its block's."""
    means: torch.Tensor = _BlockMeans.apply(x, block, rows, key_mask, backend)
    return means


@dataclass(frozen=True, eq=False)
class SharedBlocks:
    """How several processes share the blocks of a sequence, each some of the queries' and other keys'.

    Attributes:
        of_keys: ``[B, H, n, D]`` of this process' key blocks to ``[B, H, nk, D]`` of all, with a gradient. All must
            call it.
        queries: blocks that this process' queries are in.
        query_mask: bool ``[B, S]``, which of its queries' tokens are visible; None for all.
    """

    of_keys: Callable[[torch.Tensor], torch.Tensor]
    queries: slice
    query_mask: torch.Tensor | None


def add_coarse_attention(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor,
    *,
    block: int,
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    closed: torch.Tensor | None = None,
    first: int = 0,
    scale: float | None = None,
    backend: str = "auto",
    shared: SharedBlocks | None = None,
) -> torch.Tensor:
    """``out + gate * coarse``, where every token of a block shares ``coarse = softmax(scale * Qc Kc^T) Vc``.

    ``Qc``, ``Kc`` and ``Vc`` are the means of queries, keys and values over the visible tokens of each block. All of it
    has a gradient.

    Args:
        out, q, k, v: ``[B, S, H, D]`` in the model's order.
        gate: ``[B, n, H, D]``, of the tokens from ``first`` on; the others get nothing.
        block: tokens in a block.
        rows: optional int ``[B|1, H|1, S]`` permutation, slot ``i`` reads original row ``rows[b, h, i]``.
        key_mask: optional bool ``[B, S]``, visible tokens in original order; a block without any is no key.
        closed: optional bool ``[B|1, H|1, nk]``: blocks that are no keys, and whose tokens get nothing.
        first: first token that has a gate.
        scale: of the logits, ``D ** -0.5`` when left out.
        backend: of the pooling, one of :data:`~dit_accel.kernels.BACKENDS`.
        shared: several processes share the sequence: all tensors but ``closed`` are then of the slots of this one, and
            there are no ``rows``.

    Returns:
        ``[B, S, H, D]`` in the dtype of ``out``.
    """
    batch, length, heads, dim = q.shape
    number = gate.shape[1]
    if gate.shape != (batch, number, heads, dim) or first < 0 or first + number > length:
        raise ValueError(
            f"gate must be [{batch}, n, {heads}, {dim}] for n of {length} tokens from {first} on, got "
            f"{tuple(gate.shape)}."
        )
    query_mask = key_mask if shared is None else shared.query_mask
    options: dict[str, Any] = {"rows": rows, "backend": backend}
    q_mean = block_means(q, block, key_mask=query_mask, **options)
    k_mean, v_mean = (block_means(x, block, key_mask=key_mask, **options) for x in (k, v))
    seen = _tokens(k.shape[1], block, rows, key_mask, q.device)
    if shared is not None:
        k_mean, v_mean = shared.of_keys(torch.cat([k_mean, v_mean], -1)).split(dim, -1)
        seen = shared.of_keys(seen[..., None])[..., 0]
    shut = seen == 0
    if closed is not None:
        shut = shut | closed
    logits = q_mean @ k_mean.transpose(-1, -2) * scale_of(q, scale)
    # Where all is shut the weights of a softmax would be NaN.
    logits = logits.masked_fill(shut[..., None, :], torch.finfo(logits.dtype).min)
    coarse = logits.softmax(-1) @ v_mean
    coarse = coarse.masked_fill((shut if shared is None else shut[..., shared.queries])[..., None], 0.0)
    place = block_of_token(rows, length, block, q.device)[..., first : first + number].expand(batch, heads, number)
    spread = coarse.gather(2, place[..., None].expand(-1, -1, -1, dim)).transpose(1, 2)
    added = F.pad(spread * gate.to(spread.dtype), (0, 0, 0, 0, first, length - first - number))
    return (out.to(added.dtype) + added).to(out.dtype)


def _tokens(
    length: int, block: int, rows: torch.Tensor | None, key_mask: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """float32 ``[B|1, H|1, n]``: visible tokens in each block."""
    if key_mask is None:
        starts = torch.arange(math.ceil(length / block), device=device) * block
        return (length - starts).clamp(max=block).float()[None, None]
    visible = F.pad(gather_mask(key_mask, rows), (0, -length % block))
    return visible.unflatten(2, (-1, block)).sum(3, dtype=torch.float32)
