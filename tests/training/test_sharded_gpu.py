"""``dit-accel finetune`` under ``accelerate launch --use_fsdp`` on two GPUs, through NCCL."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dit_accel
from dit_accel.pipelines import load
from dit_accel.training.curves import Curves
from tests.training.test_finetune import assert_same_training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"needs two CUDA GPUs, {torch.cuda.device_count()} found"),
]
ROOT = Path(__file__).parents[2]
# Float32 all through, so that two shards and one device differ by the order of sums alone.
FINETUNE = [
    *("-m", "dit_accel.cli.main", "finetune", "embedded", "--recipe", "sla", "--set", "select.density=0.3"),
    *("--set", "select.block=(16, 16)", "--set", "order=tiles", "--set", "order.shape=(4, 2, 2)"),
    *("--size", "64x64", "--frames", "9", "--dtype", "fp32", "--precision", "no", "--learning-rate", "1e-4"),
    *("--checkpoint-every", "2", "--evaluate-every", "0"),
]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port: int = server.getsockname()[1]
        return port


def run(arguments: list[str], gpus: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": gpus, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], env=env, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False
    )


def launch(version: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Two processes with a shard each, as a user would start them."""
    shards = [
        *("-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())),
        *("--use_fsdp", "--fsdp_version", str(version), "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
        *("--fsdp_transformer_layer_cls_to_wrap", "WanTransformerBlock"),
        *("--fsdp_state_dict_type", "SHARDED_STATE_DICT", "--fsdp_cpu_ram_efficient_loading", "false"),
    ]
    return run([*shards, *arguments], "0,1")


def test_two_shards_stopped_and_resumed_equal_one_gpu(tmp_path):
    alone = [*FINETUNE, "--count", "6", "--generate-steps", "2", "--guidance", "1", "--accumulate", "2"]
    done = run([*alone, "--steps", "4", "--out", str(tmp_path / "one")], "0")
    assert done.returncode == 0, done.stderr[-3000:]
    data = ["--data", str(tmp_path / "one" / "samples"), "--out", str(tmp_path / "two")]
    for steps, resume in (("2", []), ("4", ["--resume"])):
        done = launch(2, [*FINETUNE, *data, "--steps", steps, *resume])
        assert done.returncode == 0, done.stderr[-3000:]
    curves = Curves.from_dict(json.loads((tmp_path / "one" / "curves.json").read_text()))
    assert [entry["step"] for entry in curves.steps] == [1, 2, 3, 4]
    assert_same_training(SimpleNamespace(curves=curves, adapter=tmp_path / "one" / "adapter"), tmp_path / "two")
    card = json.loads((tmp_path / "two" / "adapter" / "adapter.json").read_text())
    assert card["training"]["processes"] == 2
    dit_accel.load_adapter(load("embedded", dtype=torch.float32), tmp_path / "two" / "adapter").remove()


def test_the_first_fsdp_is_refused_by_name(tmp_path):
    done = launch(1, [*FINETUNE, "--count", "1", "--generate-steps", "1", "--steps", "1", "--out", str(tmp_path)])
    assert done.returncode != 0
    assert "--fsdp_version 2" in done.stderr + done.stdout
