"""The released model at real length: complete, in bfloat16, loadable by name, and a start for further training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import dit_accel
from dit_accel.pipelines import companion, load
from dit_accel.pipelines.builtin import builtins
from dit_accel.pipelines.embedded_long import SETTINGS, load_embedded_long

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "models_long" / "dit_accel_models_long" / "embedded_long"
STORED = {"transformer": "diffusion_pytorch_model", "text_encoder": "model"}


def stored(part: str) -> dict[str, torch.Tensor]:
    """Weights of a part as they lie in the folder."""
    with safe_open(FOLDER / part / f"{STORED[part]}.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = load("embedded-long", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, prompt: str, **more: Any) -> np.ndarray:
    call = {"height": 64, "width": 96, "num_frames": 5, "num_inference_steps": 2, "output_type": "np"}
    return np.asarray(pipe(prompt, generator=torch.Generator().manual_seed(0), **call | more).frames[0])


def test_it_is_found_and_fits_its_wheel() -> None:
    assert companion.folder_of("embedded-long") == FOLDER
    home = ROOT / "models_long" / "dit_accel_models_long"
    assert sum(file.stat().st_size for file in home.rglob("*") if file.is_file()) <= 40e6


def test_every_file_has_a_checksum_and_is_what_was_released() -> None:
    listed = set(json.loads((FOLDER / companion.CHECKSUMS).read_text()))
    present = {f.relative_to(FOLDER).as_posix() for f in FOLDER.rglob("*") if f.is_file()} - {companion.CHECKSUMS}
    assert listed == present
    companion.check_files(FOLDER, companion.LONG)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "embedded_long"
    shutil.copytree(FOLDER, folder)
    file = folder / "text_encoder" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"text_encoder.model\.safetensors .*Install dit-accel-models-long again"):
        load_embedded_long(folder=folder)


def test_weights_are_finite_and_in_bfloat16() -> None:
    for part in STORED:
        values = stored(part)
        assert {value.dtype for value in values.values()} == {torch.bfloat16}
        assert all(value.isfinite().all() for value in values.values())


def test_nothing_lies_twice_and_words_are_those_of_the_small_one() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {
        "checksums.json", "model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer",
    }  # fmt: skip
    small = companion.folder_of("embedded")
    assert (FOLDER / "tokenizer" / "tokenizer.json").read_bytes() == (small / "tokenizer/tokenizer.json").read_bytes()
    for file in FOLDER.rglob("*.json"):
        assert "_name_or_path" not in file.read_text(), file


def test_a_call_has_the_length_of_real_clips_by_itself(pipe: Any) -> None:
    assert builtins()["embedded-long"].settings == SETTINGS
    assert pipe._defaults({}) == {
        "width": 832, "height": 480, "num_frames": 81, "num_inference_steps": 20, "guidance_scale": 2.0,
    }  # fmt: skip
    latents = ((SETTINGS.frames - 1) // 4 + 1, SETTINGS.height // 8, SETTINGS.width // 8)
    assert np.prod([n // p for n, p in zip(latents, pipe.transformer.config.patch_size, strict=True)]) == 32760


def test_it_makes_what_is_asked_for(pipe: Any) -> None:
    night = generate(pipe, "a green dragon flying left over the sea at night")
    day = generate(pipe, "an airplane moving up in a cloudy sky")
    assert night.shape == (5, 64, 96, 3)
    assert np.isfinite(night).all()
    assert night.mean() < day.mean() - 0.05  # the same noise, but night is darker than day


def test_stock_diffusers_loads_the_folder(pipe: Any) -> None:
    from diffusers import AutoencoderKLWan, WanPipeline

    vae = AutoencoderKLWan.from_pretrained(companion.folder_of("embedded") / "vae")
    stock = WanPipeline.from_pretrained(FOLDER, vae=vae, torch_dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    call = {"prompt": "a red car in a forest", "guidance_scale": 2.0}
    np.testing.assert_array_equal(generate(stock, **call), generate(pipe, **call))


def test_adapters_of_the_small_model_are_refused(pipe: Any) -> None:
    assert not builtins()["embedded-long"].adapters
    for name in companion.ADAPTERS:
        with pytest.raises(ValueError, match=r"does not fit .* it is for heads 4, the model has 2"):
            dit_accel.load_adapter(pipe, name)
