"""The table of every preset: fidelity of one file, seconds of another of the same recipes, and the page shows ours."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.presets_table import BEGIN, END, HEADS, PAGE, page, table

from .test_long_table import presets_table


def files(**facts: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A file of fidelity whose processes shared a GPU, and one of seconds with other facts."""
    settings = {"frames": None, "guidance": None, "graphs": True}
    quality, seconds = presets_table(processes_on_a_gpu=3, prompts=8), presets_table(**facts)
    for one in (quality, seconds):
        one["facts"]["settings"] |= settings
    # Of the timed clips alone: another mean than that of all.
    seconds["rows"][0]["metrics"]["psnr"] = {**quality["rows"][0]["metrics"]["psnr"], "mean": 33.0}
    return quality, seconds


def test_the_page_is_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "run python -m benchmarks.presets_table --write"


def test_fidelity_is_of_one_file_and_seconds_of_the_other() -> None:
    text = table(*([one] for one in files()))
    lines = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert tuple(lines[0]) == HEADS
    assert lines[1] == [
        "`mass@0.3`", "0.420", "13 of 30", "5.00", "2.25 (1.50 to 3.38)", "33.0", "36.00 (31.00 to 41.00)",
        "0.9000 (0.9000 to 0.9000)", "-", "1.500 (1.500 to 1.500)", "12.3",
    ]  # fmt: skip
    assert "fidelity of 2 clips, FVD of 8 clips to the dense ones; seconds of 2 of them, compiled and" in text
    assert "dense takes 11.00 to 11.00 s" in text
    # A folder of the one who ran it helps no reader.
    assert "/somewhere/else" not in text


def test_a_row_without_seconds_and_one_that_did_not_run() -> None:
    quality, seconds = files()
    quality["failed"] = {"clipped": "ValueError: no"}
    quality["rows"].append({**json.loads(json.dumps(quality["rows"][0])), "row": "pooled@0.3"})
    quality["rows"][1]["metrics"]["psnr"]["mean"] = 50.0
    text = table([quality], [seconds])
    assert text.index("`pooled@0.3`") < text.index("`mass@0.3`")
    assert "| `pooled@0.3` | 0.420 | 13 of 30 | - | - | - | 50.00" in text
    assert "`clipped` did not run: ValueError: no" in text


def test_files_of_two_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="seconds must be of processes with a GPU each, got 3 on one"):
        table(*([one] for one in files(processes_on_a_gpu=3)))
    quality, seconds = files()
    seconds["facts"]["settings"]["steps"] = 10
    with pytest.raises(ValueError, match="all files must be of one steps, got 30 and 10"):
        table([quality], [seconds])
    quality, seconds = files()
    seconds["rows"][0]["recipe"] = {"select": 1}
    with pytest.raises(ValueError, match=r"row 'mass@0\.3' is another recipe"):
        table([quality], [seconds])


def test_a_further_file_adds_prompts() -> None:
    quality, seconds = files()
    more = json.loads(json.dumps(quality))
    for clip in more["rows"][0]["each"]:
        clip["seed"] += 100
        clip["metrics"]["psnr"]["value"] = 20.0
    first = [clip["metrics"]["psnr"]["value"] for clip in quality["rows"][0]["each"]]
    mean = (sum(first) + 20.0 * len(first)) / (2 * len(first))
    text = table([quality, more], [seconds])
    assert f"| {mean:.2f} (20.00 to {max(first):.2f}) |" in text
    assert "fidelity of 4 clips, FVD of 8 clips" in text
    # A row that the further file lacks keeps its clips.
    quality["rows"].append({**json.loads(json.dumps(quality["rows"][0])), "row": "pooled@0.3"})
    assert "fidelity of 2 or 4 clips, FVD" in table([quality, more], [seconds])
    with pytest.raises(ValueError, match="two files of fidelity have the same clip of row"):
        table([quality, quality], [seconds])


def test_of_seconds_measured_again_the_last_count() -> None:
    quality, seconds = files()
    again = json.loads(json.dumps(seconds))
    again["rows"][0]["total_seconds"]["median"] = 4.0
    again["rows"][0]["clips"] = 1
    assert "| 13 of 30 | 4.00 |" in table([quality], [seconds, again])
    assert "| 13 of 30 | 5.00 |" in table([quality], [again, seconds])
    assert "seconds of 1 of them, compiled" in table([quality], [seconds, again])
    again["rows"].append({**again["rows"][0], "row": "pooled@0.3", "clips": 2})
    quality["rows"].append({**quality["rows"][0], "row": "pooled@0.3"})
    assert "seconds of 1 or 2 of them, compiled" in table([quality], [seconds, again])


def test_only_the_table_of_the_page_changes() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    stale = f"{before}{BEGIN}\nold\n\n{END}{rest.split(END)[1]}"
    assert page(stale) == page(text)
