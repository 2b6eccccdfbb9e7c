"""One timed generation with a diffusers pipeline: frames, final latents, seconds."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..pipelines.pixels import Pixels, make_pixels
from .stages import StageClock, Stages, at_first_forward


@dataclass(frozen=True, eq=False)
class Generated:
    """What one call of a pipeline gave.

    Attributes:
        frames: uint8 ``[F, H, W, 3]`` on the CPU, what a viewer gets; an image is one frame.
        finite: whether the pipeline's pixels were all finite; those that were not are 0 in ``frames``.
        latents: the latents after the last denoising step, or None if the pipeline shows none.
        seconds: wall time of the whole call, until ``frames`` are there, the device idle before and after.
        stages: of these seconds; None where the pipeline does not show them.
    """

    frames: torch.Tensor
    finite: bool
    latents: torch.Tensor | None
    seconds: float
    stages: Stages | None = None


def compiles(pipe: Any) -> bool:
    """Whether a model of the pipeline is compiled, whole or in parts: patching, and undoing it, discards that code."""
    models = [value for value in getattr(pipe, "components", {}).values() if isinstance(value, torch.nn.Module)]
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for model in models
        for module in model.modules()
    )


def generate_clip(pipe: Any, prompt: str, seed: int, arguments: Mapping[str, Any] | None = None) -> Generated:
    """Run a pipeline for one prompt.

    Args:
        pipe: a diffusers pipeline, or anything called like one.
        prompt: passed as ``prompt``.
        seed: of a CPU generator, so that the noise is the same on every device.
        arguments: further arguments of the call, such as ``num_inference_steps``.

    Raises:
        ValueError: ``arguments`` sets what this function sets, or the output holds no frames in [0, 1].
    """
    arguments = dict(arguments or {})
    taken = {"prompt", "generator", "output_type", "callback_on_step_end"} & arguments.keys()
    if taken:
        raise ValueError(f"generation arguments must not set {', '.join(sorted(taken))}.")
    last: list[torch.Tensor] = []

    def keep_latents(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        clock.step()
        last[:] = [tensors["latents"]]
        return tensors

    if _takes(pipe, "callback_on_step_end"):
        arguments["callback_on_step_end"] = keep_latents
    generator = torch.Generator().manual_seed(seed)
    _wait_for_device()
    start = time.perf_counter()
    clock = StageClock(pipe)
    with at_first_forward(pipe, clock.forward):
        made = make_pixels(pipe, {"prompt": prompt, "generator": generator, **arguments})
    _wait_for_device()
    seconds = time.perf_counter() - start
    # Before anything else: the last stage ends where the clock is asked.
    stages = clock.stages(seconds)
    latents = last[0].detach().float().cpu() if last else None
    return Generated(checked_clip(made), made.nan_values == 0, latents, seconds, stages)


def checked_clip(made: Pixels) -> torch.Tensor:
    """The frames of what a pipeline made, uint8 ``[F, H, W, 3]``.

    Raises:
        ValueError: another shape, or values outside [0, 1].
    """
    name, shape = "the pipeline's output", list(made.levels.shape)
    if len(shape) != 4 or shape[-1] != 3 or 0 in shape:
        raise ValueError(f"{name} must be [frames, height, width, 3] with no empty side, got {shape}.")
    if made.low < 0 or made.high > 1:
        raise ValueError(f"{name} must lie in [0, 1], got values from {made.low:.4g} to {made.high:.4g}.")
    return made.levels


def shortened(pipe: Any, arguments: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The same arguments with ``steps`` denoising steps, where the pipeline lets them be chosen."""
    return {**arguments, "num_inference_steps": steps} if _takes(pipe, "num_inference_steps") else {**arguments}


def _takes(pipe: Any, argument: str) -> bool:
    return argument in inspect.signature(pipe.__call__).parameters


def _wait_for_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
