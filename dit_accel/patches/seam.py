"""The seam: diffusers' attention call, diverted for the layers whose hooks announced themselves.

diffusers applies qk-norm and RoPE inside the attention processors and then calls ``dispatch_attention_fn`` or
``F.scaled_dot_product_attention`` through a symbol of the processor's own module. Replacing that symbol
leaves every processor, backend choice and forward as it is. Calls from anywhere else reach the original with
all arguments.
"""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._guards import CompileContext
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ..call import AttentionInputs
from .ambient import EAGER, TRACED, LatentTokens
from .forwards import frames_of_repetition, in_backward
from .hooks import PublishLayer
from .inference_operator import inference_attention_op
from .operator import attention_op, count_op
from .parallel import SharedCall, attend_in_parallel, why_not_parallel
from .reasons import PASSED
from .rotary import MaskAndAngles, turned


@dataclass
class _Replacement:
    original: Any
    function: Any
    users: int


_replacements: dict[tuple[str, str], _Replacement] = {}
# Reentrant: a dropped model's finalizer may run wherever memory is allocated, also in here.
_lock = threading.RLock()


def seam_symbol(processor: object) -> tuple[str, str]:
    """Module and symbol through which a processor calls attention.

    Raises:
        ValueError: the processor's module has neither symbol.
    """
    module = sys.modules[type(processor).__module__]
    if hasattr(module, "dispatch_attention_fn"):
        return module.__name__, "dispatch_attention_fn"
    if isinstance(getattr(module, "F", None), types.ModuleType):
        return module.__name__, "F"
    raise ValueError(
        f"{type(processor).__name__} calls attention through neither dispatch_attention_fn nor "
        f"F.scaled_dot_product_attention of {module.__name__}, so it cannot be patched."
    )


def divert(module_name: str, symbol: str) -> Callable[[], None]:
    """Replace a symbol, or count one more user of its replacement. Returns the undo."""
    key = (module_name, symbol)
    module = sys.modules[module_name]
    with _lock:
        replacement = _replacements.get(key)
        if replacement is None:
            original = getattr(module, symbol)
            function = _FunctionalProxy() if symbol == "F" else _dispatch_in_place_of(original)
            replacement = _Replacement(original, function, 0)
        replacement.users += 1  # first: whoever ends in the meantime sees that it is used
        _replacements[key] = replacement
        if getattr(module, symbol) is replacement.original:
            setattr(module, symbol, replacement.function)

    def undo() -> None:
        with _lock:
            replacement.users -= 1
        if not _is_tracing():
            restore_unused()

    return undo


def is_diverted(module_name: str, symbol: str) -> bool:
    """Whether a call through a symbol comes to the seam now."""
    replacement = _replacements.get((module_name, symbol))
    return replacement is not None and getattr(sys.modules[module_name], symbol) is replacement.function


def restore_unused() -> None:
    """Give back the symbols that no patched model uses any longer."""
    with _lock:
        for module_name, symbol in [key for key, replacement in _replacements.items() if not replacement.users]:
            replacement = _replacements.pop((module_name, symbol))
            # What somebody has put in its place since is theirs.
            if getattr(sys.modules[module_name], symbol) is replacement.function:
                setattr(sys.modules[module_name], symbol, replacement.original)


def _is_tracing() -> bool:
    """Whether this thread compiles a model: its guards were made of the symbols as they are."""
    return CompileContext.try_get() is not None


def _announced() -> Any:
    """The layer whose module is running, marked as having called attention; None outside patched modules.

    In eager code a session and the number of a layer, in a trace their ids in a tensor.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and in_backward():
        return _repeated_layer()
    here = TRACED if compiling else EAGER
    if here.layer is not None:
        here.attended = True
    return here.layer


def _repeated_layer() -> tuple[Any, int] | None:
    """Session and layer of the module that is on the stack of a repetition."""
    for frame in frames_of_repetition():
        if "self" in frame.f_code.co_varnames[:1] and isinstance(module := frame.f_locals["self"], nn.Module):
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, PublishLayer):
                    return hook.announced
    return None


def _why_not(
    attn_mask: Any,
    dropout_p: float,
    is_causal: bool,
    attention_kwargs: Any = None,
    parallel_config: Any = None,
) -> str | None:
    """Why a call cannot be taken: one of :data:`PASSED`, or None."""
    refused = (
        is_causal,
        dropout_p,
        attention_kwargs,
        attn_mask is not None and not isinstance(attn_mask, torch.Tensor),
        function_mode_is_on(),
    )
    if not any(refused):
        return None if parallel_config is None else why_not_parallel(parallel_config)
    return next(reason for reason, holds in zip(PASSED, refused, strict=False) if holds)


def function_mode_is_on() -> bool:
    """Whether somebody replaces torch functions, as perturbed-attention guidance does with attention itself."""
    if not torch._C._len_torch_function_stack():
        return False
    # A default device is a function mode too, and changes nothing here.
    return not all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def _pass_by(layer: Any, reason: str, dense: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The model's own attention, counted with the reason."""
    if torch.compiler.is_compiling():
        assert TRACED.counts is not None
        count_op(TRACED.counts, layer, PASSED.index(reason))
        return dense()
    session, index = layer
    return session.pass_by(index, reason, dense)


def _attend(
    layer: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    scale: float | None,
    enable_gqa: bool,
    backend: str | None,
    through_dispatch: bool,
    dense: Callable[[], torch.Tensor],
    parallel: bool = False,
) -> torch.Tensor:
    if not isinstance(layer, tuple):  # a trace
        latents = LatentTokens((), 0) if TRACED.latents is None else TRACED.latents
        rest = (
            latents.places(),
            latents.tokens,
            latents.ids,
            list(TRACED.learned),
            scale,
            enable_gqa,
            backend,
            through_dispatch,
            parallel,
        )
        block_input = TRACED.block_input if TRACED.latents is None else None
        # Graphs guard on whether gradients are on. Checkpointing turns them off where it will repeat a block.
        if torch.is_grad_enabled() or block_input is not None:
            out, _ = attention_op(query, key, value, attn_mask, layer, block_input, *rest)
            return out
        return inference_attention_op(query, key, value, attn_mask, layer, *rest)
    session, index = layer
    inputs = AttentionInputs(query, key, value, attn_mask, scale)
    return session.attend(index, inputs, None, dense, EAGER.learned or None)


def _dispatch_in_place_of(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def dispatch_attention_fn(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | MaskAndAngles | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> torch.Tensor:
        def dense() -> torch.Tensor:
            return original(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale,
                enable_gqa,
                attention_kwargs,
                backend=backend,
                parallel_config=parallel_config,
            )

        if isinstance(attn_mask, MaskAndAngles):
            query, key, attn_mask = turned(query, key, attn_mask)
        layer = _announced()
        if layer is None:
            return dense()
        reason = _why_not(attn_mask, dropout_p, is_causal, attention_kwargs, parallel_config)
        if reason is not None:
            return _pass_by(layer, reason, dense)
        name = None if backend is None else getattr(backend, "value", backend)
        if parallel_config is not None and isinstance(layer, tuple):

            def gathered(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
                return original(q, k, v, mask, scale=scale, enable_gqa=enable_gqa, backend=backend)

            inputs = AttentionInputs(query, key, value, attn_mask, scale)
            config = parallel_config.context_parallel_config
            session, index = layer
            call = SharedCall(session, index, inputs, config, gathered, dense, EAGER.learned or None)
            return attend_in_parallel(call)
        parallel = parallel_config is not None
        return _attend(layer, query, key, value, attn_mask, scale, enable_gqa, name, True, dense, parallel)

    return dispatch_attention_fn


def _scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """(B, H, S, D), as torch has it."""

    def original() -> torch.Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    layer = _announced()
    if layer is None:
        return original()
    reason = _why_not(attn_mask, dropout_p, is_causal)
    if reason is not None:
        return _pass_by(layer, reason, original)
    out = _attend(
        layer,
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask,
        scale,
        enable_gqa,
        None,
        False,
        lambda: original().transpose(1, 2),
    )
    return out.transpose(1, 2)


class _FunctionalProxy(types.ModuleType):
    """``torch.nn.functional`` with one function replaced, for modules that reach it as ``F``."""

    def __init__(self) -> None:
        super().__init__("torch.nn.functional")
        self.scaled_dot_product_attention = _scaled_dot_product_attention

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)
