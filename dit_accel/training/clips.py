"""Clips and their captions as files: what is there, and their pixels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..plain_data import digest
from .samples import Skipped

PICTURES = (".gif", ".png", ".jpg", ".jpeg", ".webp")
CLIP_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", *PICTURES)
# Two ends of a file tell clips of one length apart: containers keep their tables of contents there.
END = 1 << 16


@dataclass(frozen=True)
class CaptionedClip:
    """A clip and the text that belongs to it."""

    path: Path
    caption: str

    def contents(self) -> dict[str, str]:
        """Plain data that changes when the clip or its caption does."""
        with self.path.open("rb") as file:
            head = file.read(END)
            size = file.seek(0, 2)
            file.seek(max(0, size - END))
            return {"caption": self.caption, "clip": self.path.name, "file": digest(size, head, file.read())[:16]}


def find_clips(folder: Path) -> dict[str, list[Path]]:
    """Clips of a folder, by their names without suffix.

    Raises:
        ValueError: there is no such folder, or no clip in it.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in CLIP_SUFFIXES and path.is_file():
            found.setdefault(path.stem, []).append(path)
    if not found:
        raise ValueError(f"{folder} holds no clip ({', '.join(CLIP_SUFFIXES)}).")
    return found


def with_captions(clips: Mapping[str, list[Path]], folder: Path) -> tuple[list[CaptionedClip], list[Skipped]]:
    """Clips with the text files of their names, and what lacks its other half."""
    skipped = [
        Skipped(path.name, "its clip is missing") for path in sorted(folder.glob("*.txt")) if path.stem not in clips
    ]
    usable = []
    for first, *others in clips.values():
        reason = caption = None
        try:
            caption = first.with_suffix(".txt").read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            reason = "its caption is missing"
        except (OSError, UnicodeDecodeError) as error:
            spelled = "it is no UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
            reason = f"its caption cannot be read: {spelled}"
        if caption:
            usable.append(CaptionedClip(first, caption))
        else:
            skipped.append(Skipped(first.name, reason or "its caption is empty"))
        skipped += [Skipped(path.name, f"{first.name} has the same name, and takes the caption") for path in others]
    return usable, skipped


def read_video(path: Path, width: int, height: int, frames: int) -> torch.Tensor:
    """The first frames of a clip, scaled to cover the size and cropped: float ``[1, 3, F, H, W]`` in [-1, 1].

    Pictures are brought to 8-bit RGB and turned as their EXIF data say; transparency is left out.

    Raises:
        ValueError: the clip cannot be read, or is shorter.
    """
    try:
        read = list(islice(_frames(path), frames))
    except Exception as error:  # decoders raise whatever they like for a broken file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"it cannot be read: {reason}") from error
    if len(read) < frames:
        raise ValueError(f"it has {len(read)} {'frame' if len(read) == 1 else 'frames'}, {frames} are needed")
    pixels = torch.from_numpy(np.stack(read)).permute(0, 3, 1, 2).float() / 127.5 - 1
    scale = max(height / pixels.shape[2], width / pixels.shape[3])
    size = [max(height, round(pixels.shape[2] * scale)), max(width, round(pixels.shape[3] * scale))]
    pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    pixels = pixels[:, :, top : top + height, left : left + width]
    return pixels.clamp(-1, 1).transpose(0, 1)[None]


def _frames(path: Path) -> Iterator[np.ndarray[Any, Any]]:
    """Frames as uint8 ``[H, W, 3]``."""
    if path.suffix.lower() not in PICTURES:
        import imageio.v3 as iio

        yield from iio.imiter(path)
        return
    from PIL import Image, ImageOps, ImageSequence

    with Image.open(path) as image:
        for frame in ImageSequence.Iterator(image):
            yield _as_rgb(ImageOps.exif_transpose(frame))


def _as_rgb(image: Any) -> np.ndarray[Any, Any]:
    if image.mode.startswith("I"):
        # 16 bits of gray, which Pillow would cut at 255.
        levels = np.asarray(image).astype(np.int64).clip(0, 65535)
        return np.repeat((levels // 257).astype(np.uint8)[..., None], 3, axis=2)
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))
