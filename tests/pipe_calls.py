"""Calls of tiny pipelines as plain data, so that the same call can be made on another pipeline."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from peft import LoraConfig

import dit_accel
from tests.peaked import peaked_pipeline, recipe_of
from tests.tiny import TINY

# Two of three have equally many tokens.
SIZES = {
    "wan": ((96, 112), (112, 96), (96, 96)),
    "wan2.2": ((96, 112), (112, 96), (96, 96)),
    "wan-vace": ((96, 112), (112, 96), (96, 96)),
    "hunyuan": ((64, 80), (80, 64), (64, 64)),
    "cogvideox": ((96, 112), (112, 96), (96, 96)),
    "ltx": ((32, 64), (64, 32), (32, 32)),
    "flux": ((24, 40), (40, 24), (24, 24)),
    "sd3": ((12, 16), (16, 12), (12, 12)),
    "qwen-image": ((80, 96), (96, 80), (80, 80)),
}
# Pipelines over the same transformer that begin at a later step, or pass coordinates in place of a size.
VIDEO = {
    "wan": "WanVideoToVideoPipeline",
    "wan2.2": "WanVideoToVideoPipeline",
    "cogvideox": "CogVideoXVideoToVideoPipeline",
    "ltx": "LTXConditionPipeline",
    "flux": "FluxImg2ImgPipeline",
    "sd3": "StableDiffusion3Img2ImgPipeline",
    "qwen-image": "QwenImageImg2ImgPipeline",
}


def _unipc() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


_FLOW: dict[str, Callable[[], Any]] = {"euler": FlowMatchEulerDiscreteScheduler, "unipc": _unipc}
SCHEDULERS: dict[str, dict[str, Callable[[], Any]]] = dict.fromkeys(SIZES, _FLOW) | {
    "wan": _FLOW | {"heun": FlowMatchHeunDiscreteScheduler},
    "sd3": _FLOW | {"heun": FlowMatchHeunDiscreteScheduler, "ddim": diffusers.DDIMScheduler},
    "cogvideox": {
        "ddim": diffusers.CogVideoXDDIMScheduler,
        "dpm": diffusers.CogVideoXDPMScheduler,
        "ddim without zero": lambda: diffusers.DDIMScheduler(clip_sample=False),
    },
}


@dataclass(frozen=True)
class Call:
    """One call of a pipeline.

    Attributes:
        steps: denoising steps.
        size: index into the family's sizes.
        guided: whether the prompt is guided away from a negative one.
        seed: of prompts, masks and noise.
        strength: share of the steps that a pipeline of :data:`VIDEO` runs; None for the family's own pipeline.
    """

    steps: int
    size: int = 0
    guided: bool = True
    seed: int = 0
    strength: float | None = None


def build(family: str, scheduler: str | None = None, lora: bool = False) -> Any:
    """A pipeline with peaked attention: always the same weights."""
    pipe = peaked_pipeline(TINY[family].build())
    if scheduler is not None:
        pipe.scheduler = SCHEDULERS[family][scheduler]()
    if lora:
        add_lora(pipe)
    return pipe


def add_lora(pipe: Any) -> None:
    """Load an adapter into the first transformer: always the same weights."""
    torch.manual_seed(1)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))


def another(pipe: Any, kind: str | None = None, scheduler: Any = None) -> Any:
    """A pipeline of the same or another class over the same models, with a scheduler of its own unless one is given."""
    cls = type(pipe) if kind is None else getattr(diffusers, kind)
    wanted = inspect.signature(cls.__init__).parameters
    parts = {name: part for name, part in pipe.components.items() if name in wanted}
    missing = {name: None for name, one in wanted.items() if name != "self" and one.default is inspect.Parameter.empty}
    settings = {name: value for name, value in pipe.config.items() if name in ("boundary_ratio",) and name in wanted}
    scheduler = copy.deepcopy(pipe.scheduler) if scheduler is None else scheduler
    other = cls(**missing | settings | parts | {"scheduler": scheduler})
    other.set_progress_bar_config(disable=True)
    return other


def perform(pipe: Any, family: str, call: Call, **more: Any) -> torch.Tensor:
    """Latents of a call on a pipeline, which is of :data:`VIDEO` where the call has a strength."""
    generator = torch.Generator().manual_seed(call.seed)
    arguments = TINY[family].call(generator) | _sized(family, call, generator)
    arguments |= _guided(family, call, generator)
    arguments |= {"num_inference_steps": call.steps, "generator": generator, "output_type": "latent"} | more
    if call.strength is not None and family != "ltx":
        arguments["strength"] = max(call.strength, 1.0 / call.steps)
    known = inspect.signature(type(pipe).__call__).parameters
    arguments = {name: value for name, value in arguments.items() if name in known}
    return getattr(pipe(**arguments), TINY[family].output)


def has_video(family: str, scheduler: str | None) -> bool:
    """Whether the family has a pipeline that begins at a later step, and that takes the scheduler."""
    return family in VIDEO and (scheduler in (None, "euler") or family in ("wan", "wan2.2", "cogvideox"))


def _sized(family: str, call: Call, generator: torch.Generator) -> dict[str, Any]:
    height, width = SIZES[family][call.size]
    sized: dict[str, Any] = {"height": height, "width": width}
    if call.strength is None:
        return sized
    if family in ("wan", "wan2.2"):
        return sized | {"latents": torch.randn(1, 16, 3, height // 8, width // 8, generator=generator)}
    if family == "cogvideox":
        return sized | {"latents": torch.randn(1, 3, 4, height // 8, width // 8, generator=generator)}
    return sized | {"image": torch.rand(1, 3, height, width, generator=generator)}


def _guided(family: str, call: Call, generator: torch.Generator) -> dict[str, Any]:
    """Guidance on or off, and another number of hidden tokens for every prompt."""
    given = TINY[family].call(generator)
    changes: dict[str, Any] = {}
    for shift, name in enumerate(("prompt", "negative_prompt")):
        for mask_name in (f"{name}_attention_mask", f"{name}_embeds_mask"):
            if mask_name in given:
                mask = torch.ones_like(given[mask_name])
                mask[:, mask.shape[1] - 1 - (call.seed + shift) % 4 :] = 0
                changes[mask_name] = mask
    if family in ("flux", "hunyuan"):
        changes |= {f"negative_{name}": value + 1 for name, value in given.items() if name.endswith("prompt_embeds")}
        if family == "hunyuan":
            changes["negative_prompt_attention_mask"] = changes["prompt_attention_mask"].roll(1, 1)
    scale = "true_cfg_scale" if family in ("flux", "hunyuan", "qwen-image") else "guidance_scale"
    return changes | {scale: 4.0 if call.guided else 1.0}


@cache
def expected(family: str, recipe: str | None, scheduler: str | None, lora: bool, call: Call) -> torch.Tensor:
    """What a call gives on a pipeline that was built and patched for it alone; unpatched without a recipe."""
    pipe = build(family, scheduler, lora)
    runner = pipe if call.strength is None else another(pipe, VIDEO[family])
    if recipe is not None:
        dit_accel.patch(pipe, recipe_of(recipe))
    return perform(runner, family, call)


@cache
def forward_arguments(family: str, size: int, seed: int) -> dict[str, Any]:
    """What the first transformer is given in a run of one step."""
    pipe, seen = build(family), []
    pipe.transformer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    perform(pipe, family, Call(1, size, seed=seed))
    return seen[0]


@torch.no_grad()
def bare(model: Any, family: str, size: int, seed: int) -> torch.Tensor:
    """A forward of a transformer outside any pipeline, at a timestep of no schedule."""
    given = forward_arguments(family, size, seed)
    timestep = (given["timestep"] * 0.4321).to(given["timestep"].dtype)
    return model(**given | {"timestep": timestep, "return_dict": False})[0]


@torch.no_grad()
def by_hand(pipe: Any, family: str, steps: int, size: int, seed: int) -> torch.Tensor:
    """A denoising loop written by hand around a pipeline's transformer and scheduler."""
    given = forward_arguments(family, size, seed)
    sample = given["hidden_states"]
    pipe.scheduler.set_timesteps(steps)
    for timestep in pipe.scheduler.timesteps:
        time = timestep.expand(given["timestep"].shape).to(given["timestep"].dtype)
        out = pipe.transformer(**given | {"hidden_states": sample, "timestep": time, "return_dict": False})[0]
        sample = pipe.scheduler.step(out, timestep, sample, return_dict=False)[0]
    return sample
