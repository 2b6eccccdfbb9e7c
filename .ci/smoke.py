"""What a user of the installed wheel relies on: import, command line, and one patched forward."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

import dit_accel

home = Path(dit_accel.__file__).parent
assert Path(sys.prefix) in home.parents, f"imported from {home}, not from the environment under test"
assert (home / "py.typed").is_file()

# Without the extra `cli` the command says what it needs, and all else works.
command = [str(Path(sys.executable).with_name("dit-accel")), "info", "--json"]
ran = subprocess.run(command, capture_output=True, text=True)
if find_spec("typer") is None:
    assert ran.returncode == 2, ran
    assert ran.stderr == "Error: dit-accel needs typer for its command line: pip install 'dit-accel[cli]'.\n", ran
else:
    info = json.loads(ran.stdout)
    assert any(backend["available"] for backend in info["backends"]), info["backends"]

torch.manual_seed(0)
model = WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=12, text_dim=16, ffn_dim=32, num_layers=2
).eval()
arguments = (torch.randn(1, 16, 4, 24, 24), torch.tensor([500.0]), torch.randn(1, 4, 16))
with torch.no_grad():
    dense = model(*arguments).sample
    with dit_accel.patch(model, "pooled", density=0.5) as handle:
        sparse = model(*arguments).sample
    again = model(*arguments).sample
summary = handle.summary()
assert summary.sparse_calls == 2, summary
assert 0 < (sparse - dense).abs().max() < dense.abs().max()
assert torch.equal(dense, again)
print(f"dit-accel {dit_accel.__version__} installed and working\n{summary}")
