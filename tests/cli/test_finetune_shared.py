"""``dit-accel finetune --context-parallel``: two processes that share each sequence train as one does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import dit_accel
from dit_accel.cli.main import app
from dit_accel.pipelines.random_wan import build_random_wan
from dit_accel.training.curves import Curves
from dit_accel.training.objective import OBJECTIVES
from dit_accel.training.sequence_shares import SequenceShares
from tests.training.test_finetune import assert_same_training, run_on_two
from tests.training.two_sequences import norms_seen

# In float32 all through, so that what differs is the order of sums alone.
ASKED = [
    *("--size", "64x64", "--frames", "9", "--device", "cpu", "--steps", "3", "--learning-rate", "1e-4", "--json"),
    *("--recipe", "sla", "--set", "select.block=(16, 16)", "--set", "select.density=0.3"),
    *("--dtype", "fp32", "--precision", "no"),
]


def test_two_processes_that_share_sequences_train_as_one(tmp_path: Path) -> None:
    made = ["--count", "3", "--generate-steps", "2", "--out", str(tmp_path / "one")]
    with norms_seen() as norms:
        done = CliRunner().invoke(app, ["finetune", "random-wan", *ASKED, *made])
    assert done.exit_code == 0, done.stderr
    curves = Curves.from_dict(json.loads((tmp_path / "one" / "curves.json").read_text()))
    single = SimpleNamespace(curves=curves, adapter=tmp_path / "one" / "adapter")
    for kind, more in (("ddp", ()), ("fsdp", ("--gradient-checkpointing",))):
        out = tmp_path / kind
        given = ["--data", str(tmp_path / "one" / "samples"), "--out", str(out), "--context-parallel", "2", *more]
        said = run_on_two("tests.training.two_sequences", kind, *ASKED, *given)
        lines = [line.split()[1:] for line in said.splitlines() if line.startswith("norms ")]
        assert len(lines) == 2
        for line in lines:
            assert [float(norm) for norm in line] == pytest.approx(norms, rel=1e-3)
        assert_same_training(single, out)
        card = json.loads((out / "adapter" / "adapter.json").read_text())
        assert card["training"]["processes"] == 2
        dit_accel.load_adapter(build_random_wan(), out / "adapter").remove()


def test_processes_that_cannot_share_a_sequence_are_refused(tmp_path: Path) -> None:
    asked = [*ASKED, "--out", str(tmp_path / "out"), "--context-parallel", "2"]
    done = CliRunner().invoke(app, ["finetune", "random-wan", *asked])
    assert done.exit_code == 2
    assert "shares a sequence among as many processes, and 1 were started" in done.stderr
    assert not (tmp_path / "out" / "samples").exists()


@pytest.mark.parametrize("objective", ["clear", "ssa", "gate", "dmd"])
def test_objectives_of_whole_layers_are_refused(objective: str) -> None:
    shared: Any = SimpleNamespace(_parallel_config=SimpleNamespace(context_parallel_config=object()))
    with pytest.raises(ValueError, match=r"objective\.\w+ needs whole attention layers"):
        SequenceShares.of(shared, OBJECTIVES[objective], 0, 2)


def test_tensor_parallel_is_refused() -> None:
    shared: Any = SimpleNamespace(_parallel_config=SimpleNamespace(context_parallel_config=None))
    with pytest.raises(ValueError, match="Tensor parallelism is for generating"):
        SequenceShares.of(shared, OBJECTIVES["flow"], 0, 2)
