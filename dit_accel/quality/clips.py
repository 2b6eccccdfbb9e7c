"""Clips as files: H.264 for video, PNG for images, and the labelled side-by-side film."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..pipelines.encode import write_mp4, write_png
from .video import as_video, to_uint8

# Characters that a label keeps at its end where it is shortened: a speed-up and its space.
_TAIL = 8
_CRF = 14
"""Visually lossless: a saved clip must not hide what a recipe changed."""


def save_clip(frames: Any, stem: Path, fps: float) -> Path:
    """Write a clip ``[F, H, W, 3]`` next to ``stem``: ``.mp4``, or ``.png`` for a single frame.

    Returns:
        The path with its suffix. Folders are made as needed.

    Raises:
        ValueError: the file cannot be written whole; one that was there is untouched.
    """
    levels = to_uint8(as_video(frames)).numpy()
    if len(levels) == 1:
        path = stem.with_name(stem.name + ".png")
        write_png(levels[0], path)
        return path
    path = stem.with_name(stem.name + ".mp4")
    save_film(levels, path, fps)
    return path


def save_film(frames: Iterable[np.ndarray[Any, Any]], path: Path, fps: float) -> None:
    """Write uint8 frames ``[H, W, 3]`` that need not be in memory at once as an mp4.

    Raises:
        ValueError: see :func:`~dit_accel.pipelines.encode.write_mp4`.
    """
    write_mp4(frames, path, fps, crf=_CRF, preset="slow")


def read_clip(path: Path) -> torch.Tensor:
    """A saved clip as uint8 ``[F, H, W, 3]``."""
    import imageio.v3 as iio

    frames = np.asarray(iio.imread(path))
    return torch.from_numpy(frames[None] if frames.ndim == 3 else frames)


def side_by_side(
    clips: Sequence[torch.Tensor], labels: Sequence[str], caption: str, *, width: int | None = None
) -> torch.Tensor:
    """Clips next to each other, each under its label, the caption below all.

    Args:
        clips: uint8 ``[F, H, W, 3]`` of one shape.
        labels: one for each clip.
        caption: usually the prompt; wrapped to two lines at most.
        width: pixels of the whole picture; wider ones are shrunk. None keeps the clips' own size, or twice
            that for clips under 200 pixels, so that the labels can be read.

    Returns:
        uint8 ``[F, H', W', 3]`` with even sides.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not clips or len(clips) != len(labels) or len({clip.shape for clip in clips}) != 1:
        raise ValueError(
            f"side_by_side needs equally shaped clips with a label each, got shapes "
            f"{[list(clip.shape) for clip in clips]} and {len(labels)} labels."
        )
    frames, height, clip_width, _ = clips[0].shape
    scale = 2.0 if clip_width < 200 else 1.0
    gap = 8
    if width is not None:
        scale = min(scale, (width - gap * (len(clips) + 1)) / (len(clips) * clip_width))
    pane_w, pane_h = max(2, round(clip_width * scale)), max(2, round(height * scale))
    size = max(11, min(22, pane_w // 14))
    head, line = size + 2 * gap, size + 4
    total_w = len(clips) * (pane_w + gap) + gap
    rows = textwrap.wrap(caption, max(8, int(total_w / (size * 0.55)))) if caption else []
    rows = rows[:2]
    total_h = head + pane_h + gap + (len(rows) * line + gap if rows else 0)
    total_w, total_h = total_w + total_w % 2, total_h + total_h % 2

    canvas = Image.new("RGB", (total_w, total_h), (18, 20, 24))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size)
    for i, label in enumerate(labels):
        draw.text((gap + i * (pane_w + gap), gap - 1), _fitted(label, font, pane_w), fill=(236, 238, 242), font=font)
    for i, row in enumerate(rows):
        draw.text((gap, head + pane_h + gap + i * line), row, fill=(160, 166, 178), font=font)
    film = np.repeat(np.asarray(canvas)[None], frames, axis=0)
    for i, clip in enumerate(clips):
        x = gap + i * (pane_w + gap)
        for t in range(frames):
            picture = Image.fromarray(clip[t].numpy())
            if (pane_w, pane_h) != (clip_width, height):
                picture = picture.resize((pane_w, pane_h), Image.Resampling.LANCZOS)
            film[t, head : head + pane_h, x : x + pane_w] = np.asarray(picture)
    return torch.from_numpy(film)


def _fitted(text: str, font: Any, width: int) -> str:
    """What is no wider than that: a longer text loses its middle, since its end may be a number."""
    head, tail = text[:-_TAIL], text[-_TAIL:]
    while head and font.getlength(text) > width:
        head = head[:-1]
        text = f"{head}\N{HORIZONTAL ELLIPSIS}{tail}"
    return text
