"""The part of ComfyUI that the nodes meet, written anew: patchers with options and wrappers, and tiny models.

The classes have ComfyUI's names, which the nodes go by; their attention calls have its shapes and arguments.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

PACKAGE = Path(__file__).parent.parent.parent / "integrations" / "comfyui"
HEADS, HEAD_DIM = 2, 16
WIDTH = HEADS * HEAD_DIM


def load_nodes() -> Any:
    """The node package, loaded from its folder as ComfyUI does."""
    name = "comfyui_nodes_of_dit_accel"
    spec = importlib.util.spec_from_file_location(
        name, PACKAGE / "__init__.py", submodule_search_locations=[str(PACKAGE)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def attention(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **_):
    """Attention with ComfyUI's arguments."""
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)] if mask.ndim < 3 else mask.unsqueeze(1) if mask.ndim == 3 else mask
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def optimized_attention(*args: Any, transformer_options: Any = None, **kwargs: Any) -> torch.Tensor:
    """Where ComfyUI's models call attention, and where an override takes over."""
    override = (transformer_options or {}).get("optimized_attention_override")
    if override is None:
        return attention(*args, **kwargs)
    return override(attention, *args, transformer_options=transformer_options, _inside_attn_wrapper=True, **kwargs)


class Executor:
    """Runs wrappers from the outside in, then the original."""

    def __init__(self, original: Callable[..., Any], owner: Any, wrappers: list[Callable[..., Any]]) -> None:
        self.original, self.class_obj, self.wrappers = original, owner, wrappers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return Executor(self.original, self.class_obj, self.wrappers[1:]).execute(*args, **kwargs)

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrappers[0](self, *args, **kwargs) if self.wrappers else self.original(*args, **kwargs)


def wrappers_of(options: dict[str, Any], kind: str) -> list[Callable[..., Any]]:
    return [one for ones in options.get("wrappers", {}).get(kind, {}).values() for one in ones]


class _Model(nn.Module):
    """Runs its wrappers, as each of ComfyUI's models does."""

    def forward(self, x, timestep, context, *args: Any, transformer_options: Any = None, **kwargs: Any) -> Any:
        options = {} if transformer_options is None else transformer_options
        wrappers = wrappers_of(options, "diffusion_model")
        return Executor(self._forward, self, wrappers).execute(
            x, timestep, context, *args, transformer_options=options, **kwargs
        )


class _FlatAttention(nn.Module):
    """(B, S, H * D), as Wan and LTX have it."""

    def forward(self, x, context=None, transformer_options=None):
        keys = x if context is None else context
        return optimized_attention(x * 1.5, keys, keys, heads=HEADS, transformer_options=transformer_options)


class _FlatBlock(nn.Module):
    def __init__(self, own: str, cross: str) -> None:
        super().__init__()
        self.names = own, cross
        for name in self.names:
            self.add_module(name, _FlatAttention())

    def forward(self, x, context, transformer_options):
        own, cross = (getattr(self, name) for name in self.names)
        own_out = own(x, transformer_options=transformer_options)
        # As many keys as queries, where the prompt is that long: the module tells the two apart.
        cross(x, context, transformer_options=transformer_options)
        return own_out


class WanModel(_Model):
    patch_size = (1, 2, 2)

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.ref_conv = None
        self.blocks = nn.ModuleList(_FlatBlock("self_attn", "cross_attn") for _ in range(layers))

    def _forward(self, x, timestep, context, clip_fea=None, time_dim_concat=None, transformer_options=None, **kwargs):
        if time_dim_concat is not None:
            x = torch.cat([x, time_dim_concat], dim=2)
        tokens = x[:, :WIDTH, :, ::2, ::2].flatten(2).transpose(1, 2)
        if self.ref_conv is not None:
            before = kwargs["reference_latent"][:, :WIDTH, ::2, ::2].flatten(2).transpose(1, 2)
            tokens = torch.cat([before, tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens, context, transformer_options)
        return tokens


class LTXVModel(_Model):
    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(_FlatBlock("attn1", "attn2") for _ in range(layers))

    def _forward(self, x, timestep, context, attention_mask=None, transformer_options=None, **kwargs):
        tokens = x.flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, context, transformer_options)
        return tokens


class _JointBlock(nn.Module):
    """(B, H, S, D), as Flux and HunyuanVideo have it."""

    def forward(self, x, mask=None, transformer_options=None):
        q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) * factor for factor in (1.5, 1.0, 1.0))
        return optimized_attention(
            q, k, v, HEADS, mask=mask, skip_reshape=True, transformer_options=transformer_options
        )


class _Joint(_Model):
    def __init__(self, double: int = 1, single: int = 0) -> None:
        super().__init__()
        self.refiner = _JointBlock()
        self.double_blocks = nn.ModuleList(_JointBlock() for _ in range(double))
        self.single_blocks = nn.ModuleList(_JointBlock() for _ in range(single))

    def _blocks(self, tokens, mask, options):
        for block in (*self.double_blocks, *self.single_blocks):
            tokens = block(tokens, mask, options)
        return tokens


class HunyuanVideo(_Joint):
    patch_size = (1, 2, 2)

    def _forward(self, x, timestep, context, attention_mask=None, ref_latent=None, transformer_options=None, **kwargs):
        self.refiner(context, None, transformer_options)  # the prompt alone, before any block
        mask, parts = (
            None,
            [part[..., ::2, ::2].flatten(2).transpose(1, 2) for part in (ref_latent, x) if part is not None],
        )
        tokens = torch.cat([*parts, context], dim=1)
        if attention_mask is not None:
            mask = torch.zeros(1, 1, tokens.shape[1])
            mask[:, 0, -context.shape[1] :] = (attention_mask - 1).float() * torch.finfo(torch.float32).max
        return self._blocks(tokens, mask, transformer_options)


class Flux(_Joint):
    patch_size = 2

    def _forward(
        self, x, timestep, context, y=None, guidance=None, ref_latents=None, transformer_options=None, **kwargs
    ):
        parts = [part[..., ::2, ::2].flatten(2).transpose(1, 2) for part in (x, *(ref_latents or ()))]
        return self._blocks(torch.cat([context, *parts], dim=1), kwargs.get("attention_mask"), transformer_options)


class Guider:
    """What a sampling is of: prompts by name, and the scale between them."""

    def __init__(self, options: dict[str, Any], prompts: tuple[str, ...], **scales: float) -> None:
        self.model_options = options
        self.original_conds = dict.fromkeys(prompts, ())
        self.cfg = 1.0
        vars(self).update(scales)


class Patcher:
    """A model with options, which nodes clone and change."""

    def __init__(self, diffusion_model: nn.Module) -> None:
        self.diffusion_model = diffusion_model
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Any]]] = {}
        self.attachments: dict[str, Any] = {}

    def clone(self) -> Patcher:
        made = Patcher(self.diffusion_model)
        made.model_options = copy.deepcopy(self.model_options)
        made.wrappers = {kind: {key: list(ones) for key, ones in of.items()} for kind, of in self.wrappers.items()}
        made.attachments = dict(self.attachments)
        return made

    def get_model_object(self, name: str) -> nn.Module:
        return getattr(self, name)

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def set_attachments(self, key: str, attachment: Any) -> None:
        self.attachments[key] = attachment

    def get_attachment(self, key: str) -> Any:
        return self.attachments.get(key)

    def remove_attachments(self, key: str) -> None:
        self.attachments.pop(key, None)

    def options(self, **more: Any) -> dict[str, Any]:
        """What a forward is given."""
        return {**self.model_options["transformer_options"], "wrappers": self.wrappers, **more}

    def sample(
        self, x: torch.Tensor, context: torch.Tensor, sigmas: list[float], prompts=("a", "b"), cfg=3.0, **kwargs: Any
    ):
        """A run: each prompt's forward in each step, on the same latents."""

        def steps() -> list[torch.Tensor]:
            schedule = torch.tensor(sigmas)
            return [
                self.diffusion_model(
                    x,
                    schedule[step : step + 1],
                    context,
                    transformer_options=self.options(
                        sample_sigmas=schedule,
                        sigmas=schedule[step : step + 1],
                        cond_or_uncond=[kind],
                        uuids=[prompt],
                    ),
                    **kwargs,
                )
                for step in range(len(sigmas) - 1)
                for kind, prompt in enumerate(prompts)
            ]

        guider = Guider(self.model_options, prompts, cfg=cfg)
        return Executor(steps, guider, wrappers_of({"wrappers": self.wrappers}, "outer_sample")).execute()
