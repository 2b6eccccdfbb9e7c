"""The comparison's data: validation, summaries, JSON."""

import json
import math

import pytest

from dit_accel.quality import Measurement
from dit_accel.quality.results import DENSE, ClipResult, ComparisonReport


def _report(psnr: tuple[float, ...] = (30.0, 40.0), attention: float | None = 6.0) -> ComparisonReport:
    results = []
    for i, value in enumerate(psnr):
        results.append(ClipResult("a cat", i, DENSE, 10.0 + i, attention if i == 0 else None, 1.0))
        metrics = {
            "psnr": Measurement(value=value),
            "lpips": Measurement(reason="no weights") if i else Measurement(value=0.25),
            "vmaf": Measurement(reason="no ffmpeg"),
        }
        results.append(ClipResult("a cat", i, "fast", 5.0, 2.0, 0.2 + 0.1 * i, metrics, f"clips/{i}.mp4"))
    return ComparisonReport("Tiny", tuple(results), ("fast",), {"fast": "pooled"}, 8, {"device": "CPU"}, ("n",))


def test_summary() -> None:
    summary = _report().summary("fast")
    assert summary.clips == 2
    assert summary.total_seconds.median == 5
    assert summary.speedup.median == pytest.approx((10 / 5 + 11 / 5) / 2)
    assert (summary.speedup.low, summary.speedup.high) == (pytest.approx(2.1 / 1.1), pytest.approx(2.1 * 1.1))
    assert summary.speedup.kind == "noise of the runs"
    assert summary.attention_seconds is not None
    assert summary.attention_seconds.mean == 2
    assert summary.attention_speedup is not None
    assert summary.attention_speedup.mean == pytest.approx(3)
    assert summary.density is not None
    assert summary.density.mean == pytest.approx(0.25)
    assert (summary.metrics["psnr"].low, summary.metrics["psnr"].high) == (30, 40)
    assert summary.metrics["psnr"].kind == "range"
    assert summary.metrics["lpips"].count == 1
    assert summary.missing == {"lpips": ("no weights",), "vmaf": ("no ffmpeg",)}
    assert "vmaf" not in summary.metrics


def test_unmeasured_attention_stays_unknown() -> None:
    summary = _report(attention=None).summary("fast")
    assert summary.attention_speedup is None
    assert _report(attention=None).summary(DENSE).attention_seconds is None


def test_runs_in_turns_count() -> None:
    """Two runs of each: the spread is that of runs, the clip's own time its median."""
    dense = ClipResult("a cat", 0, DENSE, 11.0, runs=(10.0, 12.0))
    fast = ClipResult("a cat", 0, "fast", 10.0, runs=(9.0, 11.0))
    report = ComparisonReport("Tiny", (dense, fast), ("fast",))
    speedup = report.summary("fast").speedup
    assert speedup.median == pytest.approx(1.1)
    noise = 11 / 9
    assert (speedup.low, speedup.high) == (pytest.approx(1.1 / noise), pytest.approx(1.1 * noise))
    assert (speedup.count, report.summary("fast").total_seconds.high) == (2, 11)
    assert ComparisonReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_enough_clips_have_a_95_percent_interval_in_json() -> None:
    summary = _report(tuple(30.0 + n for n in range(12))).to_json()["summaries"][1]
    assert summary["metrics"]["psnr"]["kind"] == summary["speedup"]["kind"] == "95%"
    assert summary["metrics"]["psnr"]["high"] < 41
    # Times are a range of runs, however many.
    assert summary["total_seconds"]["kind"] == "range"


def test_a_report_of_an_older_version_is_read() -> None:
    tree = _report().to_json()
    for result in tree["results"]:
        del result["runs"]
    assert ComparisonReport.from_json(tree) == _report()


def test_json_round_trip_with_infinity() -> None:
    report = _report((math.inf, 40.0))
    text = json.dumps(report.to_json(), allow_nan=False)
    assert ComparisonReport.from_json(json.loads(text)) == report
    summary = json.loads(text)["summaries"][1]
    assert summary["metrics"]["psnr"]["mean"] == "inf"
    assert summary["missing"]["vmaf"] == ["no ffmpeg"]


def test_other_formats_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected dit_accel.comparison version 1, got None version None"):
        ComparisonReport.from_json({})


def test_unpaired_results_are_refused() -> None:
    report = _report()
    with pytest.raises(ValueError, match="recipe 'fast' has 1 clips that do not match the 2 dense ones"):
        ComparisonReport("Tiny", report.results[:-1], ("fast",))
    with pytest.raises(ValueError, match="share recipe, prompt and seed"):
        ComparisonReport("Tiny", (*report.results, report.results[0]), ("fast",))
    with pytest.raises(ValueError, match="not be 'dense'"):
        ComparisonReport("Tiny", report.results, ("dense",))


def test_unknown_clip() -> None:
    with pytest.raises(KeyError, match="no clip of 'slow'"):
        _report().result("slow", "a cat", 0)
