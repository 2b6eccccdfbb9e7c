"""Videos and pictures as files, read back before they count as written."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..files import written_whole

Frame = np.ndarray[Any, np.dtype[np.uint8]]


def write_png(frame: Frame, path: Path) -> None:
    """Write a uint8 picture ``[H, W, 3]`` whole.

    Raises:
        ValueError: it cannot be written; a file that was there is untouched.
    """
    import imageio.v3 as iio

    with written_whole(path) as draft:
        iio.imwrite(draft, frame)
        if iio.imread(draft).shape != frame.shape:
            raise ValueError(f"Cannot write {path}: the picture cannot be read back.")


def write_animation(frames: Sequence[Frame], path: Path, fps: float) -> None:
    """Write uint8 frames ``[H, W, 3]`` as a gif of 256 colours or a lossless webp, by the path's suffix.

    Raises:
        ValueError: no frames, or the file cannot be written whole; one that was there is untouched.
    """
    from PIL import Image

    if not len(frames):
        raise ValueError(f"Cannot write {path}: there are no frames.")
    first, *others = (Image.fromarray(frame) for frame in frames)
    options: dict[str, Any] = {"lossless": True} if path.suffix.lower() == ".webp" else {"disposal": 2}
    with written_whole(path) as draft:
        # Milliseconds a frame; equal frames would be joined without the second option.
        first.save(draft, save_all=True, append_images=others, duration=round(1000 / fps), loop=0, **options)
        with Image.open(draft) as made:
            found = getattr(made, "n_frames", 1)
        if found > len(frames):
            raise ValueError(f"Cannot write {path}: {found} of {len(frames)} frames can be read back.")


def write_mp4(frames: Iterable[Frame], path: Path, fps: float, *, crf: int, preset: str = "medium") -> None:
    """Encode uint8 frames ``[H, W, 3]`` of one size as H.264 for any player; odd sides repeat their last line.

    Args:
        fps: frames a second.
        crf: x264's constant rate factor; the lower, the nearer to the frames.
        preset: x264's; the slower, the smaller the file.

    Raises:
        ValueError: no frames, or the file cannot be written whole: no encoder, no space. A file that was there is
            untouched.
    """
    options = ["-crf", str(crf), "-preset", preset, "-movflags", "+faststart"]
    with written_whole(path) as draft:
        try:
            # Absolute, since a name with a colon would be a protocol.
            count = _encode(frames, [*options, str(draft.absolute())], fps)
        except RuntimeError as error:
            raise ValueError(f"Cannot write {path}: {error}.") from error
        if (found := _count_frames(draft)) != count:
            raise ValueError(f"Cannot write {path}: {found} of {count} frames can be read back.")


def refuse_missing_encoder() -> None:
    """Encode one small frame to nowhere, before the work whose frames a video will hold.

    Raises:
        ValueError: ffmpeg is missing, or cannot encode H.264.
    """
    try:
        _encode([np.zeros((16, 16, 3), np.uint8)], ["-f", "null", "-"], 1.0)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"No video can be written: {error}.") from error


def _encode(frames: Iterable[Frame], target: Sequence[str], fps: float) -> int:
    """Feed frames to ffmpeg; returns how many. Raises RuntimeError with the reason that it gives."""
    count, process = 0, None
    with tempfile.TemporaryFile() as messages:
        try:
            for frame in frames:
                height, width, _ = frame.shape
                # Players need 4:2:0 colour, which needs even sides.
                even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                if process is None:
                    process = _start_encoder(even.shape[1], even.shape[0], fps, target, messages)
                assert process.stdin is not None
                process.stdin.write(np.ascontiguousarray(even).data)
                count += 1
            if process is None:
                raise RuntimeError("there are no frames")
            assert process.stdin is not None
            process.stdin.close()
            failed = process.wait() != 0
        except BrokenPipeError:
            failed = True
            # It gave up before the last frame, and is about to say why.
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)  # type: ignore[union-attr]
        finally:
            if process is not None:
                process.kill()
                process.wait()
        if failed:
            messages.seek(0)
            raise RuntimeError(_first_reason(messages.read().decode(errors="replace")))
    return count


def _start_encoder(
    width: int, height: int, fps: float, target: Sequence[str], messages: IO[bytes]
) -> subprocess.Popen[bytes]:
    from imageio_ffmpeg import get_ffmpeg_exe

    rate = str(Fraction(fps).limit_denominator())
    given = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", rate, "-i", "-"]
    command = [get_ffmpeg_exe(), "-y", "-v", "error", *given, "-an", "-c:v", "libx264", "-pix_fmt", "yuv420p", *target]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=messages)


def _first_reason(messages: str) -> str:
    """ffmpeg's first line, which is the cause of those after it, without the part of ffmpeg that speaks."""
    for line in messages.splitlines():
        if text := re.sub(r"^(\[[^]]*\]\s*)+", "", line).strip().rstrip("."):
            return text
    return "ffmpeg failed without a word"


def _count_frames(path: Path) -> int:
    """Frames of a file that can be decoded; 0 for anything but a video."""
    from imageio_ffmpeg import count_frames_and_secs

    try:
        return int(count_frames_and_secs(path)[0] or 0)
    except RuntimeError:
        return 0
