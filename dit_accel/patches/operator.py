"""The intercepted call as one opaque operator, so that a compiled graph holds no decision of a step.

Step, guidance branch and plans are read when the operator runs. Its gradient repeats the call with autograd
on, as activation checkpointing does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .ambient import LatentTokens
from .session import session_of


def _dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    scale: float | None,
    enable_gqa: bool,
    backend: str | None,
    through_dispatch: bool,
) -> torch.Tensor:
    if through_dispatch:
        from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

        name = None if backend is None else AttentionBackendName(backend)
        return dispatch_attention_fn(q, k, v, attn_mask=attn_mask, scale=scale, enable_gqa=enable_gqa, backend=name)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask, scale=scale, enable_gqa=enable_gqa)
    return out.transpose(1, 2)


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    layer: torch.Tensor,
    grid: list[int],
    count: int,
    ids: torch.Tensor | None,
    learned: list[torch.Tensor],
    scale: float | None,
    enable_gqa: bool,
    backend: str | None,
    through_dispatch: bool,
    record: bool,
) -> torch.Tensor:
    def dense() -> torch.Tensor:
        return _dense(q, k, v, attn_mask, scale, enable_gqa, backend, through_dispatch)

    session_id, index = layer.tolist()
    session = session_of(session_id)
    if session is None:
        return dense()
    latents = LatentTokens(tuple(grid), count, ids) if count else None
    return session.attend(index, q, k, v, attn_mask, scale, latents, dense, record, learned or None)


# A captured CUDA graph would replay one step's decision for ever.
_TAGS = tuple(tag for name in ("cudagraph_unsafe",) if (tag := getattr(torch.Tag, name, None)) is not None)


@torch.library.custom_op("dit_accel::attention", mutates_args=(), tags=_TAGS)
def attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    layer: torch.Tensor,
    grid: list[int],
    count: int,
    ids: torch.Tensor | None,
    learned: list[torch.Tensor],
    scale: float | None,
    enable_gqa: bool,
    backend: str | None,
    through_dispatch: bool,
) -> torch.Tensor:
    """Attention of the announced layer, (B, S, H, D), contiguous."""
    out = _run(
        q,
        k,
        v,
        attn_mask,
        layer,
        grid,
        count,
        ids,
        learned,
        scale,
        enable_gqa,
        backend,
        through_dispatch,
        record=True,
    )
    return out.contiguous()


@attention_op.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
    return q.new_empty(q.shape[:-1] + v.shape[-1:])


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd inside an operator, whose body otherwise runs below it."""
    below = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with below, torch.enable_grad():
        yield


@torch.library.custom_op("dit_accel::attention_backward", mutates_args=(), tags=_TAGS)
def attention_backward_op(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    layer: torch.Tensor,
    grid: list[int],
    count: int,
    ids: torch.Tensor | None,
    learned: list[torch.Tensor],
    scale: float | None,
    enable_gqa: bool,
    backend: str | None,
    through_dispatch: bool,
) -> list[torch.Tensor]:
    """Gradients of queries, keys, values and learned parameters."""
    with _recording():
        q, k, v, *learned = (tensor.detach().requires_grad_() for tensor in (q, k, v, *learned))
        out = _run(
            q,
            k,
            v,
            attn_mask,
            layer,
            grid,
            count,
            ids,
            learned,
            scale,
            enable_gqa,
            backend,
            through_dispatch,
            record=False,
        )
        inputs = (q, k, v, *learned)
        # A layer that stays dense leaves its learned parameters alone.
        grads = torch.autograd.grad(out, inputs, grad, allow_unused=True)
    return [
        torch.zeros_like(x) if gradient is None else gradient.contiguous()
        for x, gradient in zip(inputs, grads, strict=True)
    ]


@attention_backward_op.register_fake
def _(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    layer: torch.Tensor,
    grid: list[int],
    count: int,
    ids: torch.Tensor | None,
    learned: list[torch.Tensor],
    *rest: Any,
) -> list[torch.Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, *learned)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    q, k, v, attn_mask, layer, grid, count, ids, learned, *options = inputs
    ctx.save_for_backward(q, k, v, attn_mask, layer, ids, *learned)
    ctx.grid, ctx.count, ctx.options = grid, count, options


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    q, k, v, attn_mask, layer, ids, *learned = ctx.saved_tensors
    grads = attention_backward_op(grad, q, k, v, attn_mask, layer, ctx.grid, ctx.count, ids, learned, *ctx.options)
    # An empty list has no tensors to give None for: it wants an empty list back.
    grid: list[None] | None = None if ctx.grid else []
    return (*grads[:3], None, None, grid, None, None, list(grads[3:]), *[None] * len(ctx.options))


attention_op.register_autograd(_backward, setup_context=_save)
