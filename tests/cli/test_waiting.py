"""The command line lets OpenMP's threads sleep while they wait; the library leaves the environment alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dit_accel.cli.waiting import WAITING

# In torch's place, loaded where torch would be: what OpenMP would read then.
PROBE = f"""
import os
print("torch loaded with", {{name: os.environ[name] for name in {WAITING!r} if name in os.environ}}, flush=True)
os._exit(0)
"""
FROM_THE_SCRIPT = [
    "-c",
    "import sys; from dit_accel.cli.main import app; sys.argv = ['dit-accel', 'info']; sys.exit(app())",
]
AS_A_MODULE = ["-m", "dit_accel.cli.main", "info"]
ANOTHER_COMMAND = ["-m", "dit_accel.cli.main", "bench", "--device", "cpu"]
LIBRARY = ["-c", "import dit_accel; dit_accel.patch"]
THE_APP_ALONE = ["-c", "import dit_accel.cli.main, torch"]


def torch_loaded_with(folder: Path, arguments: list[str], **given: str) -> str:
    (folder / "torch.py").write_text(PROBE, encoding="utf-8")
    clean = {name: value for name, value in os.environ.items() if name not in WAITING}
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**clean, **given, "PYTHONPATH": path},
    )
    return done.stdout.strip() or done.stderr


@pytest.mark.parametrize("arguments", [FROM_THE_SCRIPT, AS_A_MODULE, ANOTHER_COMMAND])
def test_a_command_loads_torch_with_passive_waiting(tmp_path: Path, arguments: list[str]) -> None:
    assert torch_loaded_with(tmp_path, arguments) == "torch loaded with {'OMP_WAIT_POLICY': 'passive'}"


@pytest.mark.parametrize("name", WAITING)
def test_what_the_user_has_set_stays(tmp_path: Path, name: str) -> None:
    assert torch_loaded_with(tmp_path, AS_A_MODULE, **{name: "7"}) == f"torch loaded with {{{name!r}: '7'}}"


@pytest.mark.parametrize("arguments", [LIBRARY, THE_APP_ALONE])
def test_an_import_sets_nothing(tmp_path: Path, arguments: list[str]) -> None:
    assert torch_loaded_with(tmp_path, arguments) == "torch loaded with {}"


def test_nothing_is_set_where_torch_is_loaded_already() -> None:
    code = """
import os, torch
from typer.testing import CliRunner
from dit_accel.cli.main import app
assert CliRunner().invoke(app, ["info", "--device", "cpu"]).exit_code == 0
print("OMP_WAIT_POLICY" in os.environ)
"""
    clean = {name: value for name, value in os.environ.items() if name not in WAITING}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=clean)
    assert done.stdout == "False\n", done.stderr


def test_openmp_reads_it() -> None:
    """GNU OpenMP, which torch brings on Linux, says at its start what it has read."""
    clean = {name: value for name, value in os.environ.items() if name not in WAITING}
    done = subprocess.run(
        [sys.executable, *AS_A_MODULE, "--device", "cpu"],
        capture_output=True,
        text=True,
        check=False,
        env={**clean, "OMP_DISPLAY_ENV": "verbose"},
    )
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch's OpenMP is not GNU's here")
    assert "GOMP_SPINCOUNT = '0'" in done.stderr
