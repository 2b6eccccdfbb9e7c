"""``import dit_accel`` is cheap: it pulls in nothing that a command line would have to wait for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import dit_accel

# What a help page must not wait for.
HEAVY = (
    "torch",
    "numpy",
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "peft",
    "cv2",
    "imageio",
    "gradio",
)


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=dict(os.environ)
    )


def test_import_loads_nothing_but_the_package_itself() -> None:
    """Nor does it load a part of itself: what an import costs is what it loads, on any machine."""
    code = """
import sys
before = set(sys.modules)
import dit_accel
loaded = {name for name in set(sys.modules) - before if name.partition(".")[0] not in sys.stdlib_module_names}
print(sorted(loaded))
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "['dit_accel']"


def test_public_names_resolve_on_first_use() -> None:
    code = "import dit_accel; print([callable(getattr(dit_accel, n)) or n for n in dit_accel.__all__])"
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str([(name == "presets" and name) or True for name in dit_accel.__all__])


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


COMMANDS = [
    *("generate", "compare", "verify", "inspect", "calibrate", "search", "tune", "finetune", "bench", "ui"),
    "info",
]


def test_these_are_all_commands() -> None:
    result = run("from dit_accel.cli.main import app; print([c.callback.__name__ for c in app.registered_commands])")
    assert result.stdout.strip() == str(COMMANDS)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_loads_nothing_heavy(command: str) -> None:
    # A module that is None cannot be imported.
    code = f"""
import sys
sys.modules.update(dict.fromkeys({HEAVY!r}))
sys.argv = ["dit-accel", *{command.split()!r}, "--help"]
from dit_accel.cli.main import app
app()
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout
