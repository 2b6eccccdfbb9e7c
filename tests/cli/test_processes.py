"""Processes that accelerate starts share a file of prompts out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_commands import run

LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
QUIET = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
TINY = ["--device", "cpu", "--size", "64x64", "--frames", "5", "--steps", "1", "--dtype", "fp32", "--seed", "3"]
NAMES = ["001-a-red-car.mp4", "002-a-blue-dog.mp4", "003-a-green-fish.mp4"]


def launched(folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "p.txt").write_text("a red car\na blue dog\na green fish\n", encoding="utf-8")
    command = ["generate", "random-wan", "--prompts", str(folder / "p.txt"), *TINY, "--out", str(folder / "made")]
    return subprocess.run(
        [sys.executable, *LAUNCH, *QUIET, "-m", "dit_accel.cli.main", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def test_two_processes_make_what_is_missing_and_one_file_of_results(tmp_path: Path) -> None:
    made = tmp_path / "made"
    first = launched(tmp_path)
    assert first.returncode == 0, first.stderr
    assert sorted(path.name for path in made.iterdir()) == [*NAMES, "results.json", "settings.json"]
    report = json.loads((made / "results.json").read_text(encoding="utf-8"))
    assert report["processes"] == 2
    assert [(row["number"], row["seed"], row["process"]) for row in report["outputs"]] == [
        (1, 3, 0),
        (2, 4, 1),
        (3, 5, 0),
    ]
    before = {name: (made / name).read_bytes() for name in NAMES}
    (made / NAMES[1]).unlink()
    (made / NAMES[0]).write_text("kept")
    second = launched(tmp_path)
    assert second.returncode == 0, second.stderr
    assert second.stderr.count(f"{made / NAMES[0]} is finished already") == 1
    assert (made / NAMES[0]).read_text() == "kept"
    assert (made / NAMES[1]).read_bytes() == before[NAMES[1]]
    report = json.loads((made / "results.json").read_text(encoding="utf-8"))
    assert [row["process"] for row in report["outputs"]] == [None, 0, None]


def test_one_prompt_is_not_for_many(monkeypatch) -> None:
    from dit_accel.cli import processes

    many = classmethod(lambda cls, _target: cls(2, 0, 0))
    monkeypatch.setattr(processes.Processes, "launched", many)
    result = run("generate", "random-wan", "--prompt", "a cat", "--device", "cpu")
    assert result.exit_code != 0
    assert "2 processes were started, which share a file of prompts: give --prompts, or start one." in result.stderr


ENDS = """
import os
import torch
from dit_accel.cli.processes import Processes
processes = Processes.launched(torch.device("cpu"))
import torch.distributed.nn.functional
assert processes.all_of([processes.rank]) == [0, 1]
processes.end()
names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
assert not [name for name in names if "gloo" in name], names
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are read from /proc")
def test_no_thread_of_the_process_group_is_left(tmp_path: Path) -> None:
    """One that ran on would now and then abort the process where it ends."""
    script = tmp_path / "ends.py"
    script.write_text(ENDS, encoding="utf-8")
    done = subprocess.run([sys.executable, *LAUNCH, *QUIET, str(script)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
