"""Temporal flicker: errors that change from frame to frame, which single-frame metrics do not see."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from .measurement import MetricUnavailable
from .video import ClipPair, to_uint8
from .where import on_the_fastest

# Two metrics need the dense clip's flow, for every clip beside it, and it takes longer than all else of them.
_FLOW = "flow"


def _require_frames(pair: ClipPair, metric: str) -> None:
    if len(pair.reference) < 2:
        raise MetricUnavailable(f"{metric} needs at least 2 frames, got {len(pair.reference)}.")


@dataclass(frozen=True)
class Flicker:
    """Mean |(c[t+1] - c[t]) - (r[t+1] - r[t])| in 8-bit levels: how differently the two clips change.

    0 for identical clips and for an error that stays put; an error that blinks counts twice its size.
    """

    name: str = "flicker"
    label: str = "Flicker"
    unit: str = "levels"
    higher_is_better: bool = False
    digits: int = 3

    def __call__(self, pair: ClipPair) -> float:
        """Mean over pixels, channels and frame transitions."""
        _require_frames(pair, self.label)

        def total(device: torch.device) -> float:
            # Frame by frame: changes of a long clip fit into no cache.
            frames = ((x.to(device), y.to(device)) for x, y in zip(pair.candidate, pair.reference, strict=True))
            return sum(
                ((after - before) - (r_after - r_before)).abs().double().sum().item()
                for (before, r_before), (after, r_after) in pairwise(frames)
            )

        return 255 * on_the_fastest(total) / pair.reference[1:].numel()


@dataclass(frozen=True)
class FlickerFlow:
    """Mean |warp residual of c - warp residual of r| in 8-bit levels.

    Both clips' frame t is warped to t+1 by the reference's optical flow; what is left over is the residual.
    0 for identical clips and for an error that moves along with the content.
    """

    name: str = "flicker_flow"
    label: str = "Flicker (flow)"
    unit: str = "levels"
    higher_is_better: bool = False
    digits: int = 3

    def __call__(self, pair: ClipPair) -> float:
        """Mean over pixels that the flow can follow."""
        _require_frames(pair, self.label)
        reference, candidate, seen = _warp_residuals(pair)
        return 255 * _mean_where((candidate - reference).abs(), seen)


@dataclass(frozen=True)
class FlickerExcess:
    """Mean |warp residual of c| minus mean |warp residual of r| in 8-bit levels.

    The warping error of Lai et al. ("Learning Blind Video Temporal Consistency", ECCV 2018) of the candidate
    beyond that of the dense clip: positive when it flickers more, negative when it is steadier.
    """

    name: str = "flicker_excess"
    label: str = "Added warp error"
    unit: str = "levels"
    higher_is_better: bool = False
    digits: int = 3

    def __call__(self, pair: ClipPair) -> float:
        """Difference of means over pixels that the flow can follow."""
        _require_frames(pair, self.label)
        reference, candidate, seen = _warp_residuals(pair)
        return 255 * (_mean_where(candidate.abs(), seen) - _mean_where(reference.abs(), seen))


def _mean_where(values: torch.Tensor, where: torch.Tensor) -> float:
    count = where.sum().item() * values.shape[-1]
    if count == 0:
        raise MetricUnavailable("Flicker by flow found no pixel that the reference's optical flow can follow.")
    return (values.double() * where[..., None]).sum().item() / count


def _warp_residuals(pair: ClipPair) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Residuals of reference and candidate ``[F-1, H, W, 3]``, and where the flow holds ``[F-1, H, W]``."""
    if _FLOW not in pair.known:
        pair.known[_FLOW] = _reference_flow(pair)
    to_previous, seen = pair.known[_FLOW]
    residuals = []
    for clip in (pair.reference, pair.candidate):
        residuals.append(clip[1:] - _sample(clip[:-1], to_previous))
    return residuals[0], residuals[1], seen


def _sample(images: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """Read ``images [N, H, W, C]`` at each pixel plus ``flow [N, H, W, 2]`` (x, y in pixels), bilinearly."""
    _, height, width, _ = images.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x = (columns + flow[..., 0]) * 2 / max(width - 1, 1) - 1
    y = (rows + flow[..., 1]) * 2 / max(height - 1, 1) - 1
    grid = torch.stack([x, y], dim=-1)
    sampled = F.grid_sample(images.permute(0, 3, 1, 2), grid, padding_mode="border", align_corners=True)
    return sampled.permute(0, 2, 3, 1)


def _reference_flow(pair: ClipPair) -> tuple[torch.Tensor, torch.Tensor]:
    """Flow of each reference frame from 1 on back to its predecessor, and where it can be trusted.

    A pixel is trusted when it stays inside the picture and flow forth and back agree (Sundaram et al. 2010).
    """
    cv2 = _opencv()
    _, height, width, _ = pair.reference.shape
    if min(height, width) < 16:
        raise MetricUnavailable(f"Flicker by flow needs frames of at least 16x16, got {height}x{width}.")
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in to_uint8(pair.reference).numpy()]
    back, forth = [], []
    for before, after in pairwise(gray):
        # A fresh estimator each time: DIS would otherwise start from the pair before.
        estimator = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        back.append(torch.from_numpy(estimator.calc(after, before, None)))
        estimator = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        forth.append(torch.from_numpy(estimator.calc(before, after, None)))
    to_previous, to_next = torch.stack(back), torch.stack(forth)
    returned = _sample(to_next, to_previous)
    gap = (to_previous + returned).square().sum(-1)
    agree = gap < 0.01 * (to_previous.square().sum(-1) + returned.square().sum(-1)) + 0.5
    x = torch.arange(width) + to_previous[..., 0]
    y = torch.arange(height)[:, None] + to_previous[..., 1]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return to_previous, agree & inside


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise MetricUnavailable("Flicker by flow needs OpenCV: pip install 'dit-accel[quality]'.") from error
    return cv2
