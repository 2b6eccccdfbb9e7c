"""The registry, and results that are a number or a reason but never a fake zero."""

import json
import math
import subprocess
import sys

import pytest

from dit_accel.quality import METRICS, ClipPair, Measurement, find_metrics, measure
from dit_accel.quality.measurement import number_from_json, number_to_json
from tests.quality.clips import moving_clip


def test_names_are_keys() -> None:
    assert all(name == metric.name for name, metric in METRICS.items())
    assert [metric.name for metric in find_metrics(["ssim", "psnr"])] == ["ssim", "psnr"]
    assert find_metrics() == tuple(METRICS.values())


def test_the_registry_is_read_only() -> None:
    with pytest.raises(TypeError):
        METRICS["psnr"] = METRICS["ssim"]  # type: ignore[index]


def test_unknown_metric() -> None:
    with pytest.raises(ValueError, match="unknown metric 'fvd'; known are psnr, ssim"):
        find_metrics(["fvd"])


def test_every_metric_gives_a_value_or_a_reason() -> None:
    clip = moving_clip(2)
    results = measure(ClipPair(clip, clip))
    assert list(results) == list(METRICS)
    assert results["latent_mse"].value is None
    assert results["psnr"].value == math.inf


@pytest.mark.parametrize("arguments", [{}, {"value": 1.0, "reason": "both"}, {"value": math.nan}])
def test_bad_measurements(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Measurement(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1.5, 0.0, math.inf, -math.inf])
def test_numbers_survive_json(value: float) -> None:
    text = json.dumps(number_to_json(value), allow_nan=False)
    assert number_from_json(json.loads(text)) == value


def test_import_is_light() -> None:
    heavy = ["triton", "cv2", "matplotlib", "diffusers", "imageio", "jax"]
    code = f"import sys, dit_accel.quality; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
