"""VMAF orders real encodings, pairs frames by index, and reports what is missing."""

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from dit_accel.quality import METRICS, ClipPair, MetricUnavailable, measure
from dit_accel.quality import vmaf as vmaf_module
from dit_accel.quality.flicker import FlickerFlow
from dit_accel.quality.vmaf import Vmaf
from tests.quality.clips import moving_clip, with_noise


def _encode(clip: torch.Tensor, crf: int, folder: Path) -> torch.Tensor:
    path = folder / f"crf{crf}.mp4"
    frames = (clip * 255).round().byte().numpy()
    iio.imwrite(
        path, frames, fps=16, codec="libx264", macro_block_size=1, quality=None,
        output_params=["-crf", str(crf), "-pix_fmt", "yuv420p"],
    )  # fmt: skip
    return torch.from_numpy(np.asarray(iio.imread(path)))


def test_x264_order(tmp_path: Path) -> None:
    clip = with_noise(moving_clip(12, 96, 128), 0.02)
    metrics = [METRICS[name] for name in ("psnr", "ssim", "vmaf")]
    results = [measure(ClipPair(clip, _encode(clip, crf, tmp_path)), metrics) for crf in (24, 34, 44)]
    for metric in metrics:
        values = [result[metric.name].value for result in results]
        assert values[0] > values[1] > values[2], (metric.name, values)
    assert results[0]["vmaf"].value > 60


def test_frames_are_paired_by_index() -> None:
    clip = moving_clip(8, 64, 80, speed=7.0)
    shifted = torch.cat([clip[1:], clip[-1:]])
    same, off = Vmaf()(ClipPair(clip, clip.clone())), Vmaf()(ClipPair(clip, shifted))
    assert same > 90
    assert off < same - 20


def test_candidate_is_what_gets_judged() -> None:
    clip = moving_clip(4, 65, 81)
    noisy = with_noise(clip, 0.1)
    one, other = Vmaf()(ClipPair(clip, noisy)), Vmaf()(ClipPair(noisy, clip))
    assert one != pytest.approx(other, abs=0.5)


def test_a_single_image_has_a_score() -> None:
    clip = moving_clip(1, 64, 64)
    assert Vmaf()(ClipPair(clip, clip.clone())) > 90


def test_without_libvmaf_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    import imageio_ffmpeg

    vmaf_module._ffmpeg_with_vmaf.cache_clear()
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: "true")
    clip = moving_clip(2)
    result = measure(ClipPair(clip, clip), [Vmaf()])["vmaf"]
    vmaf_module._ffmpeg_with_vmaf.cache_clear()
    assert result.value is None
    assert "imageio-ffmpeg" in (result.reason or "")


def test_without_opencv_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    clip = moving_clip(2)
    with pytest.raises(MetricUnavailable, match=r"OpenCV: pip install 'dit-accel\[quality\]'"):
        FlickerFlow()(ClipPair(clip, clip))


def test_tiny_frames_give_a_reason() -> None:
    clip = torch.zeros(2, 20, 64, 3)
    with pytest.raises(MetricUnavailable, match="at least 32x32 pixels, got 20x64"):
        Vmaf()(ClipPair(clip, clip))
