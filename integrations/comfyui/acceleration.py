"""Sparse attention in a diffusion model that ComfyUI runs: which call belongs to which layer, step and prompt."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from math import isclose
from typing import Any

import torch
from torch import nn

from dit_accel import AttentionRunner, Recipe
from dit_accel.layout import StepContext
from dit_accel.patches.summary import PatchSummary

from .models import Model, key_mask

# ComfyUI's names: of its wrappers, and of the option that takes attention's place.
RUN, FORWARD, OVERRIDE = "outer_sample", "diffusion_model", "optimized_attention_override"
# Arguments of its attention functions, as far as they may come by position.
_ATTENTION = ("q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")

Override = Callable[..., torch.Tensor]


class _Thread(threading.local):
    """What is under way in one thread.

    Attributes:
        run: ends what a sampling began; None outside any.
        guided: whether that sampling also runs a forward without the prompt.
        watched: the modules that have hooks, by id.
        layer: whose module runs and has not attended yet.
        masks: of the forward, as ComfyUI made them and as they were read.
    """

    def __init__(self) -> None:
        self.run: ExitStack | None = None
        self.guided = False
        self.watched: set[int] = set()
        self.layer: int | None = None
        self.masks: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}


class Acceleration:
    """What a patch node does to the model that it is given.

    Args:
        model: what is known of the diffusion model.
        diffusion_model: the module.
        recipe: None for the default.
        backend: of every operation.
        before: the attention that another node has put in place of ComfyUI's; it runs where ours is dense.
    """

    def __init__(
        self,
        model: Model,
        diffusion_model: nn.Module,
        recipe: Recipe | None,
        backend: str = "auto",
        before: Override | None = None,
    ) -> None:
        self.model = model
        self.before = before
        names = list(model.layers(diffusion_model))
        self.runner = AttentionRunner(recipe, layers=names, backend=backend, min_tokens=model.min_tokens)
        self._thread = _Thread()
        # torch.compile must not look into these: what they do differs from call to call. The model's own code, which
        # stands below the wrapper, it may.
        opaque = torch.compiler.disable
        self.override: Override = opaque(self.attention)
        self.wrapper: Callable[..., Any] = opaque(self.forward, recursive=False)
        self._hooks = opaque(self._enter), opaque(self._leave)

    def run(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's wrapper around one sampling: plans serve it alone, and counts begin anew."""
        before = self._thread.run, self._thread.guided
        self.runner.reset()
        with self.runner.run(), ExitStack() as until:
            self._thread.run, self._thread.guided = until, is_guided(executor.class_obj)
            try:
                return executor(*args, **kwargs)
            finally:
                self._thread.run, self._thread.guided = before

    def forward(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's wrapper around one forward of the diffusion model."""
        arguments = _named(executor.original, args, kwargs)
        step = step_of(arguments.get("transformer_options") or {}, self._thread.guided)
        layout = self.model.layout(executor.class_obj, arguments)
        with self._watched(executor.class_obj), self.runner.forward(layout, step):
            return executor(*args, **kwargs)

    def attention(self, original: Override, *args: Any, **kwargs: Any) -> torch.Tensor:
        """ComfyUI's override of one attention call."""
        layer, self._thread.layer = self._thread.layer, None
        dense = partial(original if self.before is None else partial(self.before, original), *args, **kwargs)
        if layer is None:
            return dense()
        given = dict(zip(_ATTENTION, args, strict=False)) | kwargs
        heads, heads_apart = given["heads"], bool(given.get("skip_reshape"))
        stay_apart = bool(given.get("skip_output_reshape"))

        def as_ours() -> torch.Tensor:
            return _to_ours(dense(), heads, stay_apart)

        q, k, v = (_to_ours(given[name], heads, heads_apart) for name in "qkv")
        precision = given.get("attn_precision")
        if precision is not None and precision != q.dtype:
            reason = f"attention in {precision} was asked for, of {q.dtype} queries"
            out = self.runner.pass_by(layer, reason, as_ours)
        else:
            mask = self._mask(given.get("mask"), q)
            out = self.runner.attend(layer, q, k, v, as_ours, attn_mask=mask, scale=given.get("scale"))
        return out.transpose(1, 2) if stay_apart else out.flatten(2)

    def summary(self) -> PatchSummary:
        """What the latest sampling did."""
        return self.runner.summary()

    @contextmanager
    def _watched(self, module: nn.Module) -> Iterator[None]:
        """Hooks tell which layer attends, until the sampling ends, or the forward outside any."""
        thread = self._thread
        with ExitStack() as of_forward:
            of_forward.callback(thread.masks.clear)
            if id(module) not in thread.watched:
                until = of_forward if thread.run is None else thread.run
                thread.watched.add(id(module))
                until.callback(thread.watched.discard, id(module))
                enter, leave = self._hooks
                for index, layer in enumerate(self.model.layers(module).values()):
                    until.callback(layer.register_forward_pre_hook(partial(enter, index)).remove)
                    until.callback(layer.register_forward_hook(leave, always_call=True).remove)
            yield

    def _enter(self, index: int, module: nn.Module, args: Any) -> None:
        self._thread.layer = index

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._thread.layer = None

    def _mask(self, mask: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
        """A mask as the runner takes it, read once a forward."""
        if mask is None:
            return None
        if id(mask) not in self._thread.masks:
            # Held, so that its id stays its own.
            self._thread.masks[id(mask)] = mask, key_mask(mask, q.shape[0], q.shape[1])
        return self._thread.masks[id(mask)][1]


def is_guided(guider: Any) -> bool:
    """Whether what samples also runs forwards of another prompt; ComfyUI leaves them out where their scale is 1.

    A forward does not tell: prompts run together or one by one, as memory allows.
    """
    if len(guider.original_conds) < 2:
        return False
    scales = [
        value for name, value in vars(guider).items() if name.startswith("cfg") and isinstance(value, int | float)
    ]
    always = guider.model_options.get("disable_cfg1_optimization", False)
    return bool(always) or any(not isclose(scale, 1.0) for scale in scales)


def step_of(options: Mapping[str, Any], guided: bool = False) -> StepContext:
    """Where a forward is in its sampling, from ComfyUI's options; waits for the device."""
    schedule, sigmas = options.get("sample_sigmas"), options.get("sigmas")
    # ComfyUI gives each prompt an id, so that two of one step are told apart.
    prompts = zip(options.get("cond_or_uncond", ()), options.get("uuids", ()), strict=False)
    branch = ",".join(f"{('cond', 'uncond')[kind] if kind in (0, 1) else kind} {name}" for kind, name in prompts)
    if schedule is None or sigmas is None or len(schedule) < 2:
        return StepContext(branch=branch or None)
    sigma = float(sigmas.flatten()[0])
    # Samplers also look between two steps: that belongs to the step before.
    begun = sum(sigma <= one * (1 + 1e-5) for one in schedule.tolist())
    num_steps = len(schedule) - 1
    return StepContext(min(max(begun - 1, 0), num_steps - 1), num_steps, sigma, branch or None, guided=guided)


def _named(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, also those that only ``**kwargs`` take."""
    bound = inspect.signature(function).bind_partial(*args, **kwargs)
    found = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            found |= found.pop(parameter.name, {})
    return found


def _to_ours(x: torch.Tensor, heads: int, heads_apart: bool) -> torch.Tensor:
    """(B, S, H, D) of ComfyUI's (B, H, S, D), or of (B, S, H * D)."""
    return x.transpose(1, 2) if heads_apart else x.unflatten(-1, (heads, -1))
