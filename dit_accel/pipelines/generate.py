"""Run a pipeline once, whatever its family, and save what it made."""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .encode import write_animation, write_mp4, write_png
from .pixels import make_pixels

FRAMES_PER_SECOND = {"Wan": 16.0, "HunyuanVideo": 24.0, "CogVideoX": 8.0, "LTX": 25.0}
# x264's constant rate factor: low enough that a file hides nothing of what a recipe changed.
CRF = 12
# Suffixes of what can be written, the usual one first.
VIDEOS, PICTURES = (".mp4", ".gif", ".webp"), (".png", ".webp", ".jpg")


@dataclass(frozen=True, eq=False)
class Generated:
    """What one run of a pipeline made.

    Attributes:
        frames: uint8 ``[F, H, W, 3]``; an image has one frame.
        seconds: wall-clock time of the whole call, until ``frames`` are there: text encoder, denoising and decoding.
        fps: frames a second that the model was trained for.
        is_video: whether the pipeline makes videos.
        nan_values: pixel values that were not finite; they are black in ``frames``.
    """

    frames: np.ndarray[Any, np.dtype[np.uint8]] = field(repr=False)
    seconds: float
    fps: float
    is_video: bool
    nan_values: int


def generate(
    pipe: Any,
    prompt: str,
    *,
    negative_prompt: str | None = None,
    width: int | None = None,
    height: int | None = None,
    frames: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    inputs: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Generated:
    """Generate one video or image.

    None leaves a setting to the pipeline's own default. The noise is drawn on the CPU, so that a seed means
    the same on every device.

    Args:
        pipe: a diffusers pipeline.
        width, height: pixels.
        frames: of a video.
        steps: denoising steps.
        guidance: scale of classifier-free or distilled guidance.
        inputs: further arguments of the call, see :meth:`dit_accel.pipelines.inputs.Inputs.arguments`.
        progress: called after each step with the steps done and their number.

    Raises:
        ValueError: the pipeline takes no such setting.
    """
    given = call_arguments(
        pipe,
        negative_prompt=negative_prompt,
        width=width,
        height=height,
        frames=frames,
        steps=steps,
        guidance=guidance,
    )
    given |= inputs or {}
    if progress is not None and "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters:

        def after_step(current: Any, step: int, _timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
            progress(step + 1, current.num_timesteps)
            return state

        given["callback_on_step_end"] = after_step
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    _wait(pipe)
    start = time.perf_counter()
    made = make_pixels(pipe, {"prompt": prompt, "generator": generator, **given})
    _wait(pipe)
    seconds = time.perf_counter() - start
    return Generated(
        frames=made.levels.numpy(),
        seconds=seconds,
        fps=frames_per_second(pipe),
        is_video=made.is_video,
        nan_values=made.nan_values,
    )


def call_arguments(
    pipe: Any,
    *,
    negative_prompt: str | None = None,
    width: int | None = None,
    height: int | None = None,
    frames: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
) -> dict[str, Any]:
    """The settings of :func:`generate` as arguments of this pipeline's call; None leaves one out.

    Raises:
        ValueError: the pipeline takes no such setting.
    """
    takes = inspect.signature(type(pipe).__call__).parameters
    scale = "guidance_scale" if "guidance_scale" in takes else "true_cfg_scale"
    settings = {
        "negative_prompt": negative_prompt,
        "width": width,
        "height": height,
        "num_frames": frames,
        "num_inference_steps": steps,
        scale: guidance,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    for name, value in given.items():
        if name not in takes:
            raise ValueError(f"{type(pipe).__name__} takes no {name}, got {value!r}.")
    return given


def makes_video(pipe: Any) -> bool:
    """Whether a pipeline, or its class, makes videos, else images: known before it has run."""
    kind = pipe if isinstance(pipe, type) else type(pipe)
    takes = inspect.signature(kind.__call__).parameters
    return "num_frames" in takes or "video" in takes


def usual_suffix(is_video: bool) -> str:
    """Of a file that nobody named."""
    return (VIDEOS if is_video else PICTURES)[0]


def output_path(path: Path, is_video: bool, frames: int | None = None) -> Path:
    """The path with the suffix of what is saved there; a name without one gets it.

    Args:
        frames: of a video, where they are known: one frame may be saved as a picture too.

    Raises:
        ValueError: a folder, or the suffix of another kind of file.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file in it.")
    suffixes = VIDEOS if is_video else PICTURES
    if path.suffix.lower() in suffixes or (frames == 1 and path.suffix.lower() in PICTURES):
        return path
    # A model's name may hold a dot: only what is surely a suffix counts as one.
    if re.fullmatch(r"\.[a-z][a-z0-9]{2,3}", path.suffix.lower()):
        kind = "a video" if is_video else "an image"
        raise ValueError(f"This pipeline makes {kind}, saved as {' or '.join(suffixes)}; got {path.name}.")
    return path.with_name(path.name + suffixes[0])


def save(generated: Generated, path: Path) -> Path:
    """Write a video as mp4 (H.264, readable by any player), gif or webp, an image as png, webp or jpg, by its suffix;
    a video of one frame as either.

    Args:
        path: with or without suffix, see :func:`output_path`; folders are made as needed.

    Returns:
        The path written.

    Raises:
        ValueError: a suffix that does not fit, or the file cannot be written whole; one that was there is untouched.
    """
    path = output_path(path, generated.is_video, len(generated.frames))
    suffix = path.suffix.lower()
    if suffix not in VIDEOS or not generated.is_video:
        write_png(generated.frames[0], path)
    elif suffix == ".mp4":
        write_mp4(generated.frames, path, generated.fps, crf=CRF)
    else:
        write_animation(list(generated.frames), path, generated.fps)
    return path


def _wait(pipe: Any) -> None:
    if torch.device(pipe.device).type == "cuda" or torch.cuda.is_initialized():
        torch.cuda.synchronize()


def frames_per_second(pipe: Any) -> float:
    """Frames a second that a pipeline's model was trained for."""
    name = type(pipe).__name__
    return next((fps for prefix, fps in FRAMES_PER_SECOND.items() if name.startswith(prefix)), 16.0)
