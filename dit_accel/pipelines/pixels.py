"""What a pipeline made, as 8-bit levels on the host.

A clip of 832 x 480 and 81 frames is 388 MB in float32, which diffusers copies to the host and then, for its
``output_type="np"``, once more into another order. Rounded where it was decoded, it crosses as 97 MB, and the host
passes over none of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# Rounded together on a GPU: few launches, and little memory beside the clip. A CPU's caches hold one.
FRAMES_AT_ONCE = 8


@dataclass(frozen=True, eq=False)
class Pixels:
    """A clip, or an image as one frame.

    Attributes:
        levels: uint8 ``[F, H, W, C]`` on the CPU: 255 times what the pipeline gave, to the nearest, halves to even.
        is_video: whether the pipeline makes videos.
        nan_values: values that were not finite; they are 0 in ``levels``.
        low, high: the least and the largest finite value that the pipeline gave, usually within [0, 1]; ``levels``
            clip what is beyond.
    """

    levels: torch.Tensor
    is_video: bool
    nan_values: int
    low: float
    high: float


def make_pixels(pipe: Any, arguments: Mapping[str, Any]) -> Pixels:
    """Call a pipeline, and bring the first clip or image that it makes to the host.

    Args:
        pipe: a diffusers pipeline, or anything called like one.
        arguments: of its call; ``output_type`` is ours.

    Raises:
        ValueError: the output holds no frames.
    """
    stays = gives_device_tensors(pipe)
    output = pipe(**{**arguments, "output_type": "pt" if stays else "np"})
    return pixels_of(output, channels_first=stays)


def gives_device_tensors(pipe: Any) -> bool:
    """Whether ``output_type="pt"`` gives the very values of ``"np"``, on the device.

    That is so where a pipeline hands what it decoded to diffusers' ``VideoProcessor``. A pipeline of another package
    may know ``"np"`` alone, and some of diffusers' give something else (latents, values in [-1, 1]).
    """
    kind = _without_our_defaults(type(pipe))
    if kind.__module__.partition(".")[0] != "diffusers" or kind.__name__ in ("LTXI2VLongMultiPromptPipeline",):
        return False
    from diffusers.video_processor import VideoProcessor

    processor = type(getattr(pipe, "video_processor", None))
    # A pipeline that has a second one (LTX2HDRPipeline) decodes for that.
    return not hasattr(pipe, "hdr_video_processor") and all(
        getattr(processor, name, None) is getattr(VideoProcessor, name)
        for name in ("postprocess_video", "postprocess", "pt_to_numpy")
    )


def _without_our_defaults(kind: type) -> type:
    """diffusers' class below one of :mod:`~dit_accel.pipelines.call_defaults`, which hands its output on as it is."""
    ours = f"{__package__}.call_defaults"
    return next(base for base in kind.__mro__ if base.__module__ != ours) if kind.__module__ == ours else kind


def pixels_of(output: Any, channels_first: bool = False) -> Pixels:
    """The first clip, or the first image as one frame, of a pipeline's output.

    Args:
        output: with ``frames`` or ``images``, on any device.
        channels_first: whether frames are ``[3, H, W]``, as for ``output_type="pt"``, else ``[H, W, 3]``.

    Raises:
        ValueError: the output holds none.
    """
    frames = frames_of(output)
    if channels_first:
        frames = frames.movedim(-3, -1)
    is_video = getattr(output, "frames", None) is not None
    if not frames.numel():
        return Pixels(frames.cpu().to(torch.uint8), is_video, 0, 0.0, 0.0)
    if frames.dtype == torch.uint8:
        return Pixels(frames.cpu(), is_video, 0, float(frames.min()) / 255, float(frames.max()) / 255)
    # Before the first question to the device, so that the host finds the memory while it still decodes: 97 MB are 80 ms
    # of page faults, whose copy, into memory that the driver knows, then takes 2 ms (H200).
    on_host = torch.empty(frames.shape, dtype=torch.uint8, pin_memory=frames.is_cuda)
    low, high = (float(end) for end in frames.aminmax())
    not_finite = 0
    # NaN is the least and the largest of what holds it.
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        not_finite = int(frames.numel() - frames.isfinite().sum())
        frames = frames.nan_to_num(0.0, 0.0, 0.0)
        low, high = (float(end) for end in frames.aminmax())
    levels = torch.empty_like(on_host, device=frames.device) if frames.is_cuda else on_host
    at_once = 1 if frames.device.type == "cpu" else FRAMES_AT_ONCE
    for some, rounded in zip(frames.split(at_once), levels.split(at_once), strict=True):
        rounded.copy_(some.float().clamp(0.0, 1.0).mul_(255.0).round_())
    return Pixels(levels if levels is on_host else on_host.copy_(levels), is_video, not_finite, low, high)


def frames_of(output: Any) -> torch.Tensor:
    """The first clip, or the first image as one frame, of a pipeline's output, as it is there.

    Raises:
        ValueError: the output holds none.
    """
    clips = getattr(output, "frames", None)
    if clips is not None:
        return _tensor_of(clips[0])
    images = getattr(output, "images", None)
    if images is not None:
        return _tensor_of(images[:1])
    raise ValueError(f"{type(output).__name__} has neither frames nor images.")


def _tensor_of(values: Any) -> torch.Tensor:
    """Of a tensor, an array, a picture, or a list of these."""
    if isinstance(values, torch.Tensor):
        return values.detach()
    if isinstance(values, (list, tuple)):
        return torch.stack([_tensor_of(one) for one in values])
    # A picture's own memory cannot be written, and torch knows no array that runs backwards.
    if not isinstance(values, np.ndarray) or min(values.strides, default=0) < 0:
        values = np.array(values, order="C")
    return torch.from_numpy(values)
