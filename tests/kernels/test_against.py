"""A kernel's before and after: no ratio of a version that is wrong, or whose tests are red."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.against import Version, compared, main

ROOT = Path(__file__).parents[2]
SMALL = ["--device=cpu", "--length=128", "--heads=1", "--dim=16"]


class Fixed(Version):
    def __init__(self, sums: dict[str, float], ms: float) -> None:
        self.sums, self._ms = sums, ms

    def ms(self, name: str) -> float:
        return self._ms


def test_a_ratio_is_before_over_after():
    (row,) = compared(Fixed({"a": 1.0, "gone": 2.0}, 6.0), Fixed({"a": 1.0, "new": 2.0}, 4.0), 5)
    assert row["call"] == "a"
    assert row["ratio"] == 1.5
    assert row["range"] == [1.5, 1.5]
    assert row["agree"]


@pytest.mark.parametrize(("other", "agree"), [(1.0005, True), (1.01, False), (float("nan"), False)])
def test_results_must_agree(other, agree):
    assert compared(Fixed({"a": 1.0}, 6.0), Fixed({"a": other}, 4.0), 1)[0]["agree"] == agree


def test_red_tests_end_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["against.py", "HEAD", "--tests", "no/such/test.py -q"])
    with pytest.raises(SystemExit, match="The tests are red"):
        main()


def test_a_version_is_timed_in_a_process_of_its_own():
    version = Version(ROOT, SMALL)
    try:
        assert "forward 128x64" in version.sums
        assert version.ms("forward 128x64") > 0
    finally:
        version.end()


def test_an_unknown_commit_is_a_sentence(monkeypatch):
    if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("not in a git repository")
    monkeypatch.setattr(sys, "argv", ["against.py", "no-such-commit", "--tests", ""])
    with pytest.raises(SystemExit, match="git has no commit 'no-such-commit'"):
        main()
