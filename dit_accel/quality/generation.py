"""One timed generation with a diffusers pipeline: frames, final latents, seconds."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from .stages import StageClock, Stages, at_first_forward
from .video import as_video, to_uint8


@dataclass(frozen=True, eq=False)
class Generated:
    """What one call of a pipeline gave.

    Attributes:
        frames: float32 ``[F, H, W, 3]`` in [0, 1] on the CPU; an image is one frame.
        finite: whether the pipeline's pixels were all finite; those that were not are 0 in ``frames``.
        latents: the latents after the last denoising step, or None if the pipeline shows none.
        seconds: wall time of the whole call, the device idle before and after.
        stages: of these seconds; None where the pipeline does not show them.
    """

    frames: torch.Tensor
    finite: bool
    latents: torch.Tensor | None
    seconds: float
    stages: Stages | None = None

    def in_8_bits(self) -> Generated:
        """The same with uint8 frames in 0..255, what a viewer gets, in a quarter of the memory."""
        return replace(self, frames=to_uint8(self.frames))


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
        ValueError: ``arguments`` sets what this function sets, or the output holds no frames.
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
        output = pipe(prompt=prompt, generator=generator, output_type="np", **arguments)
    _wait_for_device()
    seconds = time.perf_counter() - start
    frames = frames_of(output)
    finite = bool(frames.isfinite().all())
    if not finite:
        frames = frames.nan_to_num(0.0, 0.0, 0.0)
    latents = last[0].detach().float().cpu() if last else None
    clip = as_video(frames, "the pipeline's output")
    return Generated(clip, finite, latents, seconds, clock.stages(seconds))


def shortened(pipe: Any, arguments: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The same arguments with ``steps`` denoising steps, where the pipeline lets them be chosen."""
    return {**arguments, "num_inference_steps": steps} if _takes(pipe, "num_inference_steps") else {**arguments}


def _takes(pipe: Any, argument: str) -> bool:
    return argument in inspect.signature(pipe.__call__).parameters


def _wait_for_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def frames_of(output: Any) -> torch.Tensor:
    """The first clip, or the first image as one frame, of a pipeline's output: ``[F, H, W, 3]``.

    Raises:
        ValueError: the output holds none.
    """
    clips = getattr(output, "frames", None)
    if clips is not None:
        return torch.as_tensor(clips[0])
    images = getattr(output, "images", None)
    if images is not None:
        return torch.as_tensor(images[:1])
    raise ValueError(f"{type(output).__name__} has neither frames nor images.")
