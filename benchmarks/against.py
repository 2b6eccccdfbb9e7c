"""A kernel's before and after: this working tree against another commit, in turns, tests first.

    python benchmarks/against.py main [--tests "tests/kernels -m gpu"] [--rounds 9] [--json out.json]

The tests of the kernels run first: a red test ends it, since a speed-up of a wrong kernel is none. Then both versions
run in processes of their own. One at a time is asked for one call, in turns, and the order of a pair is shuffled. A
ratio is before / after, the median over the rounds, with the range of its middle half.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# Both versions' results: relative to a sum of squares. The order of sums may change, a block may not.
AGREE = 1e-3


class Version:
    """One version of the package in a process of its own."""

    def __init__(self, tree: Path, options: list[str]) -> None:
        script = str(Path(__file__).with_name("timed_calls.py"))
        self._process = subprocess.Popen(
            [sys.executable, script, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(tree)},
        )
        self.sums: dict[str, float] = self._answer()["calls"]

    def ms(self, name: str) -> float:
        """Milliseconds of a call."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        return float(self._answer()["ms"])

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"A version ended with exit code {self._process.wait()}; its error is above.")
        found: dict[str, Any] = json.loads(line)
        return found


@contextmanager
def tree_of(commit: str) -> Iterator[Path]:
    """The files of a commit, in a folder that is gone afterwards; or a folder that holds them already."""
    if Path(commit).is_dir():
        yield Path(commit).resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        add = subprocess.run(
            ["git", "worktree", "add", "--detach", folder, commit], cwd=ROOT, capture_output=True, text=True
        )
        if add.returncode:
            raise SystemExit(f"git has no commit {commit!r}: {add.stderr.strip().splitlines()[-1]}")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=ROOT, check=True)


def compared(before: Version, after: Version, rounds: int) -> list[dict[str, Any]]:
    """A row for each call that both have."""
    pick, rows = random.Random(0), []
    for name in [name for name in after.sums if name in before.sums]:
        wanted, got = before.sums[name], after.sums[name]
        row: dict[str, Any] = {"call": name, "agree": abs(got - wanted) <= AGREE * abs(wanted)}
        times: dict[str, list[float]] = {"before": [], "after": []}
        for _ in range(rounds):
            pair = [("before", before), ("after", after)]
            pick.shuffle(pair)
            for side, version in pair:
                times[side].append(version.ms(name))
        ratios = sorted(b / a for b, a in zip(times["before"], times["after"], strict=True))
        row |= {f"{side}_ms": statistics.median(found) for side, found in times.items()}
        row |= {"ratio": statistics.median(ratios), "range": [ratios[rounds // 4], ratios[-1 - rounds // 4]]}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="what to compare with, such as main or HEAD~1, or a folder of its files")
    parser.add_argument("--tests", default="tests/kernels -m gpu -x -q", help="arguments of pytest; empty for none")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    for name, default in (("device", "cuda"), ("length", "32768"), ("heads", "12"), ("dim", "128")):
        parser.add_argument(f"--{name}", default=default)
    asked = parser.parse_args()
    if asked.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {asked.rounds}.")
    tests = shlex.split(asked.tests)
    if tests and subprocess.run([sys.executable, "-m", "pytest", *tests], cwd=ROOT).returncode:
        raise SystemExit("The tests are red: no time counts.")
    options = [f"--{name}={getattr(asked, name)}" for name in ("device", "length", "heads", "dim")]
    with tree_of(asked.commit) as tree:
        before = Version(tree, options)
        try:
            after = Version(ROOT, options)
            try:
                rows = compared(before, after, asked.rounds)
            finally:
                after.end()
        finally:
            before.end()
    print(f"{'call':<32} {'before':>9} {'after':>9} {'ratio':>7}  middle half")
    for row in rows:
        said = "" if row["agree"] else "  DIFFERENT RESULTS"
        low, high = row["range"]
        print(
            f"{row['call']:<32} {row['before_ms']:>9.3f} {row['after_ms']:>9.3f} {row['ratio']:>7.3f}  "
            f"{low:.3f} to {high:.3f}{said}"
        )
    if asked.json:
        asked.json.write_text(json.dumps({"against": asked.commit, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    if not all(row["agree"] for row in rows):
        raise SystemExit("Some results differ between the versions: no time counts.")


if __name__ == "__main__":
    main()
