"""Built-in models are called with a prompt alone; their defaults survive what diffusers does with a pipeline."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import dit_accel
from dit_accel.pipelines import load
from dit_accel.pipelines.builtin import builtins
from dit_accel.pipelines.dtypes import dtype_argument

OF_EMBEDDED = {"width": 192, "height": 192, "num_frames": 29, "num_inference_steps": 10, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = load("embedded", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What reaches diffusers' own call, which does nothing here."""
    seen: list[dict[str, Any]] = []
    stock = diffusers.WanPipeline.__call__
    signature = inspect.signature(stock)

    def record(self: Any, *args: Any, **kwargs: Any) -> None:
        seen.append({k: v for k, v in signature.bind(self, *args, **kwargs).arguments.items() if k != "self"})

    record.__signature__ = signature  # type: ignore[attr-defined]
    monkeypatch.setattr(diffusers.WanPipeline, "__call__", record)
    return seen


def test_a_prompt_alone_fits_the_model(pipe: Any) -> None:
    """No size is given: diffusers' own 832 x 480 would be too large for the rotary table."""
    latents = pipe("a red car in a forest", num_inference_steps=1, guidance_scale=1.0, output_type="latent").frames
    assert latents.shape == (1, 16, 8, 24, 24)


@pytest.mark.parametrize("name", list(builtins()))
def test_every_builtin_has_its_settings(name: str, calls: list[dict[str, Any]]) -> None:
    settings = builtins()[name].settings
    load(name)("a cat")
    assert calls == [
        {
            "prompt": "a cat",
            "width": settings.width,
            "height": settings.height,
            "num_frames": settings.frames,
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance,
        }
    ]


def test_what_is_given_wins(pipe: Any, calls: list[dict[str, Any]]) -> None:
    pipe("a cat", "blurry", 64, num_frames=1)
    given = {"prompt": "a cat", "negative_prompt": "blurry", "height": 64, "num_frames": 1}
    assert calls == [{**OF_EMBEDDED, **given}]


def test_a_saved_folder_keeps_them(pipe: Any, tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    pipe.save_pretrained(tmp_path)
    again = load(str(tmp_path), dtype=torch.float32)
    again("a cat")
    type(pipe).from_pretrained(tmp_path)("a cat")
    # Stock diffusers reads the folder, and knows nothing of them.
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock) is diffusers.WanPipeline
    stock("a cat")
    assert calls == [{"prompt": "a cat", **OF_EMBEDDED}] * 2 + [{"prompt": "a cat"}]
    again.save_pretrained(tmp_path / "twice")
    load(str(tmp_path / "twice"))("a cat")
    assert calls[-1] == calls[0]


def test_from_pipe_hands_them_on(pipe: Any, calls: list[dict[str, Any]]) -> None:
    type(pipe).from_pipe(pipe)("a cat")
    assert calls == [{"prompt": "a cat", **OF_EMBEDDED}]
    other = diffusers.WanVideoToVideoPipeline.from_pipe(pipe)
    assert other.transformer is pipe.transformer
    back = type(pipe).from_pipe(other)
    back("a cat")
    assert calls[1] == calls[0]


def test_it_passes_for_the_stock_class(pipe: Any) -> None:
    assert isinstance(pipe, diffusers.WanPipeline)
    assert type(pipe).__name__ == "WanPipeline"
    assert pickle.loads(pickle.dumps(type(pipe))) is type(pipe)
    assert copy.copy(pipe).config == pipe.config
    known = set(inspect.signature(diffusers.WanPipeline.__call__).parameters)
    assert set(inspect.signature(type(pipe).__call__).parameters) == known


def test_a_patched_call_with_a_prompt_alone(pipe: Any) -> None:
    """As in the README's first lines, with few steps for speed; automatic, and with its size known to the patch."""
    with dit_accel.patch(pipe) as handle:
        pipe("a red car in a forest", num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    assert sum(handle.summary().dense_calls.values()) + handle.summary().sparse_calls == 8
    with pytest.raises(ValueError, match="WanPipeline is not patched"):
        dit_accel.unpatch(pipe)


@pytest.mark.parametrize(
    ("version", "name"), [("0.36.0", "torch_dtype"), ("0.39.1", "torch_dtype"), ("0.40.0", "dtype"), ("1.2.0", "dtype")]
)
def test_the_argument_of_the_installed_diffusers(version: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers, "__version__", version)
    assert dtype_argument(torch.float16) == {name: torch.float16}


def test_loading_is_silent_and_of_the_dtype(tmp_path: Path) -> None:
    """Built in, and from a folder; a warning would be an error here."""
    script = (
        "import sys, torch\n"
        "from dit_accel.pipelines import load\n"
        "pipe = load('embedded', dtype=torch.float16)\n"
        "pipe.save_pretrained(sys.argv[1])\n"
        "again = load(sys.argv[1], dtype=torch.float16)\n"
        "print(pipe.transformer.dtype, again.transformer.dtype, again.vae.dtype)\n"
    )
    command = [sys.executable, "-W", "error::FutureWarning", "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["torch.float16", "torch.float16", "torch.float32"]
    assert "deprecated" not in done.stderr
