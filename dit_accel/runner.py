"""Attention of a transformer that other code drives: no pipeline of diffusers, no hook, no symbol."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from . import presets
from .call import AttentionCall, AttentionInputs
from .engine import Engine
from .kernels import BACKENDS
from .layout import StepContext, TokenLayout
from .patches.summary import PatchSummary, summarise
from .recipe import Recipe
from .run import Run

if TYPE_CHECKING:
    from .patches.reuse.tracker import ReuseTracker

Layout = TokenLayout | str | Callable[[int], TokenLayout | str]
"""A layout, the reason why there is none, or a function from the length of a sequence to one of the two."""


@dataclass(eq=False)
class _Forward:
    layout: Layout
    step: StepContext
    run: Run

    def layout_of(self, seq_len: int) -> TokenLayout | str:
        layout = self.layout if isinstance(self.layout, (TokenLayout, str)) else self.layout(seq_len)
        if isinstance(layout, TokenLayout) and layout.seq_len != seq_len:
            return f"the layout is of {layout.seq_len} tokens, the call of {seq_len}"
        return layout


class _Thread(threading.local):
    """What a runner knows in one thread."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.forward: _Forward | None = None


class AttentionRunner:
    """Runs the self-attention of one transformer under a recipe, for programs with a denoising loop of their own.

    The program says when a run and a forward begin and where the latent tokens are, and hands over each
    self-attention call. Threads may share a runner; each has runs of its own.

    >>> runner = dit_accel.AttentionRunner("mass", layers=["block 0", "block 1"], density=0.2)  # doctest: +SKIP
    >>> with runner.run():  # doctest: +SKIP
    ...     for index, sigma in enumerate(sigmas):
    ...         step = StepContext(index, len(sigmas), sigma, "cond")
    ...         with runner.forward(TokenLayout((21, 30, 52), 0, 32760), step):
    ...             out = runner.attend(0, q, k, v, dense=lambda: attention(q, k, v))
    >>> print(runner.summary())  # doctest: +SKIP

    Args:
        recipe: a :class:`~dit_accel.Recipe`, the name of a preset, or None for the default of
            :func:`dit_accel.patch`, which stays dense where a sequence is too short to gain.
        layers: a name for each self-attention layer, in the order of execution.
        backend: of every operation; a named one that cannot run raises at the first call.
        min_tokens: sequence length below which sparse attention gains nothing on a GPU.
        options: of the named preset, e.g. ``density=0.2``.

    Attributes:
        recipe: the recipe in force.
        engine: runs the calls, counts and times them.

    Raises:
        ValueError: an unknown recipe, option or backend; a recipe that needs more than the calls of attention: one
            that reuses blocks' results, learns, or needs a calibration.
    """

    def __init__(
        self,
        recipe: Recipe | str | None = None,
        *,
        layers: Sequence[str],
        backend: str = "auto",
        min_tokens: int = 8192,
        **options: Any,
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"Unknown backend {backend!r}; known are {', '.join(BACKENDS)}.")
        if not layers:
            raise ValueError("layers must name at least one self-attention layer, got none.")
        self.recipe, self._note = presets.choose(recipe, options, in_pipeline=True)
        missing = why_not_run(self.recipe)
        if missing is not None:
            raise ValueError(missing)
        self.engine = Engine(self.recipe, list(layers), backend, min_tokens, automatic=recipe is None)
        # Which a summary asks for: what stands around whole blocks is not here.
        self.reuse: ReuseTracker | None = None
        self._thread = _Thread()
        self._numbers = itertools.count()

    @contextmanager
    def run(self) -> Iterator[None]:
        """Around one denoising run: its plans serve no other run, and are dropped at its end."""
        before, self._thread.run = self._thread.run, Run()
        try:
            yield
        finally:
            self._thread.run.forget()
            self._thread.run = before

    @contextmanager
    def forward(self, layout: Layout, step: StepContext | None = None) -> Iterator[None]:
        """Around one forward of the transformer.

        Args:
            layout: where the latent tokens are in the sequences of its self-attentions.
            step: where the forward is in the run: ``index``, ``num_steps``, ``sigma``, and ``branch``, a name that
                tells the forwards of one step apart. The runner counts forwards by itself. None where no step is
                known: the recipe then has no dense phase.
        """
        number = next(self._numbers)
        run = self.engine.run if self._thread.run is None else self._thread.run
        before = self._thread.forward
        self._thread.forward = _Forward(layout, replace(step or StepContext(), forward_id=number), run)
        try:
            yield
        finally:
            self._thread.forward = before

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dense: Callable[[], torch.Tensor],
        *,
        attn_mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        """One self-attention call, (B, S, H, D).

        Args:
            layer: its index in ``layers``.
            q: (B, S, H, D), after norms and rotary embedding.
            k: the same of the keys, of as many heads or fewer.
            v: (B, S, H, D) of the values, of as many heads as the keys.
            dense: the program's own attention for this very call, (B, S, H, D), which runs where the recipe is dense.
            attn_mask: bool, True where a key is seen: (B, S) of keys, or one of pairs that broadcasts to
                (B, H, S, S).
            scale: of the logits; ``D ** -0.5`` if None.

        Raises:
            ValueError: the backend was named and cannot run an operation of the recipe.
        """
        forward = self._thread.forward
        if forward is None:
            return self.pass_by(layer, "called outside a forward of its transformer", dense)
        if q.shape[1] != k.shape[1]:
            return self.pass_by(layer, "keys and queries differ in number", dense)
        inputs = AttentionInputs(q, k, v, attn_mask, scale)
        layout = forward.layout_of(k.shape[1])
        if isinstance(layout, TokenLayout) and not self.recipe.spans_references:
            layout = layout.without_references()
        return self.engine.attend(AttentionCall.of(layer, inputs, layout, forward.step, forward.run), dense)

    def pass_by(self, layer: int, reason: str, dense: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A call of a layer that the program must have dense, counted with the reason."""
        return self.engine.pass_by(layer, reason, dense)

    def summary(self) -> PatchSummary:
        """What ran so far: calls, true density, time, fallbacks. Waits for the device."""
        return summarise(self.recipe, self._note, {"": self})

    def reset(self) -> None:
        """Begin the counts, times and notes of :meth:`summary` anew. Plans stay."""
        self.engine.reset()


def why_not_run(recipe: Recipe) -> str | None:
    """A sentence that says what a recipe needs beside the calls of attention; None where nothing."""
    if not recipe.reuse.is_none:
        what = f"a reuse of blocks' results ({type(recipe.reuse).__name__})"
    elif recipe.compensate.is_learned:
        what = f"weights that were trained ({type(recipe.compensate).__name__})"
    elif recipe.order.needs_calibration:
        what = f"a calibration ({type(recipe.order).__name__})"
    else:
        return None
    return f"The recipe has {what}, which needs dit_accel.patch and a model of diffusers."
