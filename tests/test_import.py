"""``import dit_accel`` is cheap: it pulls in nothing that a command line would have to wait for."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

HEAVY = ("torch", "triton", "diffusers", "transformers", "accelerate", "cv2", "imageio", "rich", "typer")


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=dict(os.environ)
    )


def test_import_loads_nothing_heavy() -> None:
    result = run(f"import dit_accel, sys; print([name for name in {HEAVY!r} if name in sys.modules])")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_import_is_quick() -> None:
    code = "import time; s = time.perf_counter(); import dit_accel; print(time.perf_counter() - s)"
    # The best of a few: a busy machine slows single runs.
    seconds = min(float(run(code).stdout) for _ in range(5))
    assert seconds < 0.2


def test_public_names_resolve_on_first_use() -> None:
    code = "import dit_accel; print([callable(getattr(dit_accel, n)) or n for n in dit_accel.__all__])"
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[True, True, True, True, True, True, 'presets', True, True]"


def test_patching_needs_neither_triton_nor_cuda() -> None:
    """A patched CPU forward works where Triton cannot be imported, and CUDA stays untouched."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from diffusers import WanTransformer3DModel
import dit_accel
sizes = dict(num_attention_heads=2, attention_head_dim=12, text_dim=16, ffn_dim=32, num_layers=1)
model = WanTransformer3DModel(**sizes)
with torch.no_grad(), dit_accel.patch(model, "pooled", density=0.5) as handle:
    model(torch.randn(1, 16, 4, 16, 16), torch.tensor([1.0]), torch.randn(1, 4, 16))
assert handle.summary().sparse_calls == 1, handle.summary()
assert not torch.cuda.is_initialized()
"""
    env = {"TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=dict(os.environ) | env
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", [[], ["generate"], ["bench"], ["info"]], ids=lambda c: c[0] if c else "app")
def test_help_needs_no_torch(command: list[str]) -> None:
    code = f"""
import sys
sys.modules["torch"] = None
sys.argv = ["dit-accel", *{command!r}, "--help"]
from dit_accel.cli.main import app
app()
"""
    start = time.perf_counter()
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout
    assert time.perf_counter() - start < 10
