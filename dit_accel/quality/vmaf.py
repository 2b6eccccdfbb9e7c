"""VMAF, computed by the libvmaf inside imageio-ffmpeg's ffmpeg."""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from .measurement import MetricUnavailable
from .video import ClipPair, to_uint8

_SMALLEST_SIDE = 32
"""libvmaf's four-scale features need some pixels left at the coarsest scale."""


@lru_cache(maxsize=1)
def _ffmpeg_with_vmaf() -> str:
    try:
        import imageio_ffmpeg

        executable: str = imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise MetricUnavailable(f"VMAF needs ffmpeg: pip install imageio-ffmpeg ({error}).") from error
    listing = subprocess.run(
        [executable, "-hide_banner", "-filters"], capture_output=True, text=True, check=False
    ).stdout
    if " libvmaf " not in listing:
        raise MetricUnavailable(
            f"VMAF needs an ffmpeg with libvmaf, which {executable} lacks: pip install -U imageio-ffmpeg "
            "and unset IMAGEIO_FFMPEG_EXE."
        )
    return executable


@dataclass(frozen=True)
class Vmaf:
    """VMAF (Netflix, model vmaf_v0.6.1) of the candidate against the reference, mean over frames, 0 to 100.

    Frames are rounded to 8 bits and compared losslessly at their own size. Trained on 1080p pictures seen
    from three picture heights: on small clips use it to order, not as an absolute grade.
    """

    name: str = "vmaf"
    label: str = "VMAF"
    unit: str = ""
    higher_is_better: bool = True
    digits: int = 2

    def __call__(self, pair: ClipPair) -> float:
        """Pooled mean score."""
        frames, height, width, _ = pair.reference.shape
        if min(height, width) < _SMALLEST_SIDE:
            raise MetricUnavailable(
                f"VMAF needs frames of at least {_SMALLEST_SIDE}x{_SMALLEST_SIDE} pixels, got {height}x{width}."
            )
        # Each picture holds the candidate above the reference, and the filter cuts it apart again: frames
        # then pair by index whatever ffmpeg does with timestamps.
        stacked = torch.cat([to_uint8(pair.candidate), to_uint8(pair.reference)], dim=1).contiguous()
        clock = f"settb=AVTB,setpts=N/{pair.fps:g}/TB"
        graph = (
            f"[0:v]{clock},split[top][bottom];"
            f"[top]crop={width}:{height}:0:0:exact=1,format=yuv444p[candidate];"
            f"[bottom]crop={width}:{height}:0:{height}:exact=1,format=yuv444p[reference];"
            "[candidate][reference]libvmaf=log_fmt=json:log_path=vmaf.json:n_threads=2:shortest=1"
        )
        command = [_ffmpeg_with_vmaf(), "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
        command += ["-s", f"{width}x{2 * height}", "-r", f"{pair.fps:g}", "-i", "pipe:0"]
        command += ["-filter_complex", graph, "-f", "null", "-"]
        with tempfile.TemporaryDirectory() as folder:
            # A relative log path needs no escaping in the filter graph.
            run = subprocess.run(command, input=stacked.numpy().tobytes(), capture_output=True, cwd=folder, check=False)
            log = Path(folder) / "vmaf.json"
            if run.returncode or not log.is_file():
                raise MetricUnavailable(f"VMAF failed in ffmpeg: {run.stderr.decode(errors='replace').strip()[-300:]}.")
            report = json.loads(log.read_text())
        if len(report["frames"]) != frames:
            raise MetricUnavailable(f"VMAF scored {len(report['frames'])} of {frames} frames.")
        return float(report["pooled_metrics"]["vmaf"]["mean"])
