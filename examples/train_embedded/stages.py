"""The plan of a training: stages of growing clips and pictures, and how far along it a run is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from compose import ClipGeometry
from model import TEXT_TOKENS


@dataclass(frozen=True)
class Stage:
    """A part of the training: `latent_frames` a clip, `batch` size, `capacity` of the pool in clips.

    `renew` a chunk of the pool every so many steps; `share` of the plan; `text_tokens` to pad captions to: 512 as
    WanPipeline does by default, fewer where the clip is short and padding would cost more than that. `size` is height
    and width in pixels, where it is not that of the whole training.
    """

    latent_frames: int
    batch: int
    capacity: int
    renew: int
    share: float
    text_tokens: int = TEXT_TOKENS
    size: tuple[int, int] | None = None

    @property
    def frames(self) -> int:
        return 4 * self.latent_frames - 3

    def geometry(self, clip_frames: int, side: int) -> ClipGeometry:
        """Of a whole clip; without a size of its own a square of `side` pixels."""
        height, width = self.size or (side, side)
        return ClipGeometry(max(clip_frames, self.frames), height, width)

    def chunk(self, clips: int, side: int) -> int:
        """How many clips to render and encode at once: about the pixels of `clips` of 29 frames of 192 x 192."""
        height, width = self.size or (side, side)
        fitting = clips * 29 * 192 * 192 // (self.frames * height * width)
        return min(max(1, fitting), 4 * clips, self.capacity)


def parse_size(text: str) -> tuple[int, int]:
    """Height and width of `480x832`, or of a square, `192`."""
    parts = text.split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) >= 16 and int(part) % 16 == 0 for part in parts):
        raise argparse.ArgumentTypeError(f"a size is HEIGHTxWIDTH in multiples of 16 pixels, got {text!r}")
    return int(parts[0]), int(parts[-1])


def parse_stage(text: str) -> Stage:
    """`latent_frames:batch:capacity:renew:share:text_tokens`, and perhaps `:HEIGHTxWIDTH`.

    For example `8:48:6000:4:0.6:512` or `21:4:256:2:0.5:512:480x832`.
    """
    parts = text.split(":")
    if len(parts) not in (6, 7):
        raise argparse.ArgumentTypeError(
            f"a stage is latent_frames:batch:capacity:renew:share:text_tokens[:HEIGHTxWIDTH], got {text!r}"
        )
    size = parse_size(parts[6]) if len(parts) == 7 else None
    return Stage(int(parts[0]), int(parts[1]), int(parts[2]), int(parts[3]), float(parts[4]), int(parts[5]), size)


def ends(stages: Sequence[Stage], steps: int | None) -> list[float]:
    """Where in the plan, from 0 to 1, each stage ends; on a whole step where the plan counts steps."""
    total = sum(stage.share for stage in stages)
    reached, found = 0.0, []
    for stage in stages:
        reached += stage.share / total
        found.append(reached if steps is None else round(reached * steps) / steps)
    return [*found[:-1], 1.0]
