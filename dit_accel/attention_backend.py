"""Sparse attention under a name of diffusers' own: ``model.set_attention_backend("dit_accel")``.

diffusers gives a backend queries, keys and values, and nothing of the layer, the step or the latent grid. What needs
those stays with :func:`dit_accel.patch`.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName

from . import presets
from .layout import TokenLayout
from .patches.ambient import EAGER
from .patches.summary import PatchSummary
from .recipe import Recipe
from .runner import AttentionRunner
from .stages.schedule import Schedule

# A key mask, dropout or a causal mask: the model's own attention knows what they mean.
_UNREAD = "a mask, dropout or causality, which a backend without a layout leaves to the model's own attention"
_lock = threading.Lock()


class RegisteredBackend:
    """What :func:`register_backend` returns. Usable as a context manager that removes the name at its end.

    Attributes:
        name: as diffusers knows it.
        recipe: in force at every call.
    """

    def __init__(self, name: str, runner: AttentionRunner, min_tokens: int) -> None:
        self.name = name
        self.recipe = runner.recipe
        self._runner = runner
        self._least = min_tokens
        self._member: AttentionBackendName | None = None

    def summary(self) -> PatchSummary:
        """What ran so far, all layers together: calls, density, time, reasons. Waits for the device."""
        return self._runner.summary()

    def reset(self) -> None:
        """Begin the counts, times and notes of :meth:`summary` anew."""
        self._runner.reset()

    def remove(self) -> None:
        """Take the name back. Removing twice does nothing.

        A model that still has the name fails at its next call: give it another one first. Where diffusers uses the
        name for all models, it goes back to torch's own attention.
        """
        with _lock:
            member, self._member = self._member, None
            if member is None:
                return
            registry = attention_dispatch._AttentionBackendRegistry
            if registry._active_backend == member:
                registry.set_active_backend(AttentionBackendName.NATIVE)
            for table in (registry._backends, registry._constraints, registry._supported_arg_names):
                table.pop(member, None)
            AttentionBackendName._member_map_.pop(member.name, None)
            AttentionBackendName._value2member_map_.pop(member.value, None)
            AttentionBackendName._member_names_.remove(member.name)

    def __enter__(self) -> RegisteredBackend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _add(self) -> None:
        with _lock:
            if self.name in AttentionBackendName._value2member_map_:
                raise ValueError(f"diffusers has an attention backend {self.name!r} already: give another name.")
            # diffusers looks a name up among the members of its enumeration, which no public call extends.
            member: Any = str.__new__(AttentionBackendName, self.name)
            member._name_, member._value_ = self.name.upper(), self.name
            member.__objclass__ = AttentionBackendName
            AttentionBackendName._member_map_[member._name_] = member
            AttentionBackendName._value2member_map_[self.name] = member
            AttentionBackendName._member_names_.append(member._name_)
            self._member = member
            attention_dispatch._AttentionBackendRegistry.register(member)(self._function())

    def _function(self) -> Any:
        """What diffusers calls; it reads the names of the arguments."""

        @torch.compiler.disable
        def attend(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attn_mask: torch.Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            scale: float | None = None,
            enable_gqa: bool = False,
        ) -> torch.Tensor:
            def dense() -> torch.Tensor:
                return attention_dispatch.dispatch_attention_fn(
                    query,
                    key,
                    value,
                    attn_mask,
                    dropout_p,
                    is_causal,
                    scale,
                    enable_gqa,
                    backend=AttentionBackendName.NATIVE,
                )

            if EAGER.layer is not None:
                return dense()  # of a patched layer, whose recipe wants it dense and counts it
            if attn_mask is not None or dropout_p or is_causal:
                return self._runner.pass_by(0, _UNREAD, dense)
            with self._runner.run(), self._runner.forward(self._layout_of):
                return self._runner.attend(0, query, key, value, dense, scale=scale)

        return attend

    def _layout_of(self, seq_len: int) -> TokenLayout | str:
        if seq_len < self._least:
            return f"{seq_len} tokens, too few to gain (below {self._least})"
        return TokenLayout((1, 1, seq_len), 0, seq_len)


def register_backend(
    recipe: Recipe | str = "pooled",
    *,
    name: str = "dit_accel",
    min_tokens: int = 8192,
    backend: str = "auto",
    **options: Any,
) -> RegisteredBackend:
    """Give diffusers an attention backend that computes a share of the block pairs.

    >>> with dit_accel.register_backend(density=0.3):  # doctest: +SKIP
    ...     pipe.transformer.set_attention_backend("dit_accel")
    ...     video = pipe(prompt).frames[0]
    ...     pipe.transformer.set_attention_backend("native")

    It takes every self-attention of a model as one row of tokens: there is no latent grid, so that blocks are runs of
    the sequence and text is chosen as latents are; no step, so that no step stays dense and each call chooses anew; no
    layer, so that all layers have one recipe. Calls with a mask, with dropout, of fewer tokens, or whose keys are not
    the queries', run in torch's own attention. :func:`dit_accel.patch` has none of these limits and is nearer to
    dense at the same density; this is for code that can set a backend's name and nothing else.

    Args:
        recipe: a :class:`~dit_accel.Recipe` or the name of a preset. What it says of steps does not act.
        name: lower case, as ``set_attention_backend`` and ``attention_backend`` take it.
        min_tokens: sequence length below which a call stays dense.
        backend: of every operation, as :func:`dit_accel.patch` has it.
        options: of the named preset, e.g. ``density=0.2``.

    Returns:
        What removes the name, and says what ran.

    Raises:
        ValueError: the name is diffusers' own or no lower-case word; an unknown recipe, option or backend; a recipe
            that needs more than the calls of attention.
    """
    if not name.isidentifier() or name != name.lower():
        raise ValueError(f"The name of a backend must be a lower-case word, got {name!r}.")
    chosen = presets.resolve(recipe, **options)
    # A plan must not outlive its call: the next one may be of another layer.
    found = RegisteredBackend(
        name, AttentionRunner(replace(chosen, schedule=Schedule()), layers=["all layers"], backend=backend), min_tokens
    )
    found._add()
    return found
