"""bench --context-parallel starts processes by itself and says what each had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dit_accel import presets
from dit_accel.benchmarking.context_parallel import Shared, bench_shared, refuse
from tests.cli.documented import documented_keys
from tests.cli.test_commands import run

SMALL = ["bench", "--layers", "1", "--size", "64x64", "--frames", "9", "--device", "cpu", "--repeats", "1"]
BLOCKS = ["--set", "select.block=[16,16]", "--set", "select.density=0.3", "--dtype", "fp32"]


def test_two_processes_and_a_table(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    arguments = [*SMALL, *BLOCKS, "--context-parallel", "2", "--ring", "2"]
    result = run(*arguments, "--out", str(out))
    assert result.exit_code == 0, result.stderr
    data = json.loads(out.read_text(encoding="utf-8"))
    assert list(data) == documented_keys(arguments)
    assert data["context_parallel"] == {"processes": 2, "ring": 2, "ulysses": 1}
    assert [row["rank"] for row in data["ranks"]] == [0, 1]
    for row in data["ranks"]:
        assert 0.3 <= row["density"] < 1.0
        assert not row["dense_calls"]
        # torch's own attention has no log-sum-exp, which diffusers' own ring needs.
        assert list(row["timings"]) == ["dense, one", "patched, one", "patched, shared"]
    assert data["relative_difference"] < 1e-5
    assert data["finite"]
    assert data["imbalance"] >= 1.0
    assert "ring 2, Ulysses 1" in result.stdout
    assert "patched, shared over patched, one:" in result.stdout
    assert "of linear" in result.stdout


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--context-parallel", "1"], "--context-parallel needs at least 2 processes, got 1."),
        (["--context-parallel", "4", "--ring", "3"], "--ring must divide --context-parallel 4, got 3."),
        (["--ring", "2"], "--ring goes with --context-parallel, got it without."),
        (["--context-parallel", "2", "--pipeline"], "times a forward, and does not go with --pipeline"),
    ],
)
def test_what_cannot_be_is_refused(given: list[str], said: str) -> None:
    result = run(*SMALL, *given)
    assert result.exit_code != 0
    assert said in result.stderr


def test_fewer_gpus_than_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    shared = Shared("wan2.1-1.3b", 64, 64, 9, 1, 2, None, "bfloat16", "cuda")
    with pytest.raises(ValueError, match="--context-parallel 2 needs as many GPUs, and this machine has 1"):
        refuse(shared)


def test_dense_forwards_may_be_left_out() -> None:
    recipe = presets.resolve("pooled", density=0.3).to_dict()
    shared = Shared("wan2.1-1.3b", 128, 128, 9, 2, 1, recipe, "float32", "cpu", layers=1, repeats=1, dense=False)
    data = bench_shared(shared)
    assert [list(row["timings"]) for row in data["ranks"]] == [["patched, one", "patched, shared"]] * 2
    assert list(data["speedup"]) == ["over patched, one"]
