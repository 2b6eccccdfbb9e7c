"""What a user of the installed wheels relies on: import, a patched forward, the command line, and the built-in model.

Run after each of dit-accel, dit-accel[cli], dit-accel-models and dit-accel-models-long: what is not installed yet is
missed in one sentence.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

import dit_accel

home = Path(dit_accel.__file__).parent
assert Path(sys.prefix) in home.parents, f"imported from {home}, not from the environment under test"
assert (home / "py.typed").is_file()
assert not list(home.rglob("*.safetensors")), "the wheel is to be code alone"


def command(*words: str) -> subprocess.CompletedProcess[str]:
    program = str(Path(sys.executable).with_name("dit-accel"))
    return subprocess.run([program, *words], capture_output=True, text=True)


def refused(sentence: str, *words: str) -> None:
    ran = command(*words)
    assert (ran.returncode, ran.stderr) == (2, f"Error: {sentence}\n"), ran


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
done = ["import", "patched forward"]

clip = ("--prompt", "a red car in a forest", "--size", "96x96", "--frames", "9", "--steps", "2", "--json", "--out")
if find_spec("typer") is None:
    refused("dit-accel needs typer for its command line: pip install 'dit-accel[cli]'.", "info", "--json")
    done.append("command line missed in one sentence")
else:
    info = json.loads(command("info", "--json").stdout)
    assert any(backend["available"] for backend in info["backends"]), info["backends"]
    adapters = {one["name"]: one["adapters"] for one in info["models"]}
    done.append("info")
    if find_spec("dit_accel_models") is None:
        assert list(adapters) == ["random-wan"]
        refused(
            "The model 'embedded' comes with dit-accel-models, which is not installed: `pip install ./models` in a "
            "checkout of dit-accel.",
            "generate",
            *clip,
            "clip.mp4",
        )
        done.append("model missed in one sentence")
    else:
        assert adapters["embedded"] == ["sla-0.05", "sla-0.1"], adapters
        for more in ((), ("--adapter", "sla-0.1")):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder, "clip.mp4")
                ran = command("generate", *more, *clip, str(out))
                assert ran.returncode == 0, ran
                assert out.stat().st_size > 1000
        done += ["clip", "clip of an adapter"]
        if find_spec("dit_accel_models_long") is None:
            assert "embedded-long" not in adapters
            refused(
                "The model 'embedded-long' comes with dit-accel-models-long, which is not installed: `pip install "
                "./models ./models_long` in a checkout of dit-accel.",
                "generate",
                "embedded-long",
                *clip,
                "clip.mp4",
            )
            done.append("long model missed in one sentence")
        else:
            assert adapters["embedded-long"] == [], adapters
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder, "clip.mp4")
                ran = command("generate", "embedded-long", *clip, str(out))
                assert ran.returncode == 0, ran
                assert out.stat().st_size > 1000
            done.append("clip of the long model")
print(f"Python {platform.python_version()}, torch {torch.__version__}: {', '.join(done)}")
