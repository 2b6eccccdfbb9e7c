"""The intercepted call as one opaque operator, so that a compiled graph holds no decision of a step.

Step, guidance branch and plans are read when the operator runs. Its gradient repeats the call with autograd
on, as activation checkpointing does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from ..call import AttentionInputs
from .ambient import LatentTokens
from .parallel import SharedCall, attend_in_parallel
from .reasons import PASSED
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
    parallel_config: Any = None,
) -> torch.Tensor:
    if through_dispatch:
        from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

        name = None if backend is None else AttentionBackendName(backend)
        given: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa, "backend": name}
        return dispatch_attention_fn(q, k, v, attn_mask=attn_mask, parallel_config=parallel_config, **given)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask, scale=scale, enable_gqa=enable_gqa)
    return out.transpose(1, 2)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    layer: torch.Tensor,
    places: list[int],
    count: int,
    ids: torch.Tensor | None,
    learned: list[torch.Tensor],
    scale: float | None,
    enable_gqa: bool,
    backend: str | None,
    through_dispatch: bool,
    parallel: bool,
    served: tuple[int, int] | None = None,
) -> torch.Tensor:
    """The call of the announced layer, or again what ``served`` names of an earlier one."""
    session_id, index = layer.tolist()
    session = session_of(session_id)
    config = session.parallel_config if session is not None and parallel else None

    def dense() -> torch.Tensor:
        return _dense(q, k, v, attn_mask, scale, enable_gqa, backend, through_dispatch, config)

    if session is None:
        if parallel:
            raise RuntimeError("Code that was compiled for a patched model in parallel outlived the patch.")
        return dense()
    inputs = AttentionInputs(q, k, v, attn_mask, scale)
    latents = LatentTokens.of_places(places, count, ids) if count else None
    if config is not None:

        def gathered(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            return _dense(q, k, v, mask, scale, enable_gqa, backend, through_dispatch)

        shared = config.context_parallel_config
        call = SharedCall(session, index, inputs, shared, gathered, dense, learned or None, served)
        return attend_in_parallel(call, latents)
    if served is not None:
        return session.repeat(*served, index, inputs, dense, learned or None)
    return session.attend(index, inputs, latents, dense, learned or None)


# A captured CUDA graph would replay one step's decision for ever.
TAGS = tuple(tag for name in ("cudagraph_unsafe",) if (tag := getattr(torch.Tag, name, None)) is not None)


@torch.library.custom_op("dit_accel::attention", mutates_args=(), tags=TAGS)
def attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    layer: torch.Tensor,
    block_input: torch.Tensor | None,
    places: list[int],
    count: int,
    ids: torch.Tensor | None,
    learned: list[torch.Tensor],
    scale: float | None,
    enable_gqa: bool,
    backend: str | None,
    through_dispatch: bool,
    parallel: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the announced layer, (B, S, H, D), contiguous, and the number of its forward and of the call within
    it, int64 [2], by which the gradient finds what this call used."""
    session = session_of(int(layer[0]))
    with nullcontext() if session is None else session.compiled_block(block_input):
        out = attend(
            q,
            k,
            v,
            attn_mask,
            layer,
            places,
            count,
            ids,
            learned,
            scale,
            enable_gqa,
            backend,
            through_dispatch,
            parallel,
        )
    served = (-1, 0) if session is None else session.served()
    # Whatever the default device is.
    return out.contiguous(), torch.tensor(served, device=layer.device)


@attention_op.register_fake
def _(
    q: torch.Tensor, _k: torch.Tensor, v: torch.Tensor, _mask: torch.Tensor | None, layer: torch.Tensor, *_rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape[:-1] + v.shape[-1:]), layer.new_empty(2)


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd inside an operator, whose body otherwise runs below it."""
    below = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with below, torch.enable_grad():
        yield


@torch.library.custom_op("dit_accel::attention_backward", mutates_args=(), tags=TAGS)
def attention_backward_op(
    grad: torch.Tensor,
    forward: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    layer: torch.Tensor,
    places: list[int],
    count: int,
    ids: torch.Tensor | None,
    learned: list[torch.Tensor],
    scale: float | None,
    enable_gqa: bool,
    backend: str | None,
    through_dispatch: bool,
    parallel: bool,
) -> list[torch.Tensor]:
    """Gradients of queries, keys, values and learned parameters."""
    with _recording():
        q, k, v, *learned = (tensor.detach().requires_grad_() for tensor in (q, k, v, *learned))
        out = attend(
            q,
            k,
            v,
            attn_mask,
            layer,
            places,
            count,
            ids,
            learned,
            scale,
            enable_gqa,
            backend,
            through_dispatch,
            parallel,
            (int(forward[0]), int(forward[1])),
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
    _grad: torch.Tensor,
    _forward: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    _mask: torch.Tensor | None,
    _layer: torch.Tensor,
    _places: list[int],
    _count: int,
    _ids: torch.Tensor | None,
    learned: list[torch.Tensor],
    *_rest: Any,
) -> list[torch.Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, *learned)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, attn_mask, layer, _, places, count, ids, learned, *options = inputs
    ctx.save_for_backward(output[1], q, k, v, attn_mask, layer, ids, *learned)
    ctx.places, ctx.count, ctx.options = places, count, options


def _backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:
    forward, q, k, v, attn_mask, layer, ids, *learned = ctx.saved_tensors
    grads = attention_backward_op(
        grad, forward, q, k, v, attn_mask, layer, ctx.places, ctx.count, ids, learned, *ctx.options
    )
    # An empty list has no tensors to give None for: it wants an empty list back.
    no_places: list[None] | None = None if ctx.places else []
    return (*grads[:3], None, None, None, no_places, None, None, list(grads[3:]), *[None] * len(ctx.options))


attention_op.register_autograd(_backward, setup_context=_save)


def new_counts() -> torch.Tensor:
    """Counters of one layer's dense calls in compiled code, by index into :data:`PASSED`."""
    return torch.zeros(len(PASSED), dtype=torch.int64)


@torch.library.custom_op("dit_accel::count", mutates_args=("counts",), tags=TAGS)
def count_op(counts: torch.Tensor, layer: torch.Tensor, reason: int) -> None:
    """Count a dense call of the announced layer in compiled code: ``counts`` is int64 ``[len(PASSED)]``."""
    session = session_of(int(layer[0]))
    if session is not None and session.counts():
        counts[reason] += 1


@count_op.register_fake
def _(counts: torch.Tensor, layer: torch.Tensor, reason: int) -> None:
    pass
